"""An evaluation put together: what models say of the data, and every metric of it. Models are never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import training
from megu_cli.baselines.mask import mask
from megu_cli.evaluation import accuracy, aggregates, distance, entanglement, membership, probe, relearning
from megu_cli.execution.runtime import generator, seeded
from megu_cli.pipeline.workspace import Workspace

# Test images in the report's planes: enough to see shapes, few enough to draw.
_DRAWN = 800
# Classes that the probe tells the forgotten ones from, at most: a regression on 12,000 classes would take hours.
_PROBED_CLASSES = 200

Figures = dict[str, float | None]


class Said:
    """What a model says of one split: four figures of every image, and outputs and features of a few.

    The outputs of all images would take memory with the size of the data set: K + D numbers an image.

    Args:
        number: Images N.
        classes: Classes K.
        outputs: Sorted positions whose logits are kept.
        sampled: Sorted positions whose penultimate features are kept.

    Attributes:
        predicted: (N,) int32, the class of the largest logit.
        entropy: (N,) float64 of the output, in nats.
        sure: (N,) probability of the true class.
        loss: (N,) cross-entropy in nats.
        logits: (len(outputs), K).
        features: (len(sampled), D).
        sums: (K, D), `entanglement.class_sums` of all images.
    """

    def __init__(self, number: int, classes: int, outputs: Tensor, sampled: Tensor) -> None:
        self.predicted = torch.empty(number, dtype=torch.int32)
        self.entropy = torch.empty(number, dtype=torch.float64)
        self.sure, self.loss = torch.empty(2, number)
        self.logits = torch.empty(len(outputs), classes)
        self.features = torch.empty(0, 0)
        self.sums = torch.zeros(classes, 0, dtype=torch.float64)
        self._outputs, self._sampled = outputs, sampled

    def add(self, start: int, logits: Tensor, features: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            start: Position of its first image.
            logits: (B, K).
            features: (B, D).
            labels: (B,) true labels.
        """
        here = slice(start, start + len(logits))
        p = logits.softmax(1)
        self.predicted[here] = logits.argmax(1).int()
        self.entropy[here] = membership.entropy(p)
        self.sure[here] = p.gather(1, labels[:, None])[:, 0]
        self.loss[here] = functional.cross_entropy(logits, labels, reduction="none")
        if not start:
            self.features = torch.empty(len(self._sampled), features.shape[1])
            self.sums = torch.zeros(len(self.sums), features.shape[1], dtype=torch.float64)
        self.sums += entanglement.class_sums(features, labels, len(self.sums))
        for positions, kept, values in ((self._outputs, self.logits, logits), (self._sampled, self.features, features)):
            first, last = torch.searchsorted(positions, torch.tensor([here.start, here.stop])).tolist()
            kept[first:last] = values[positions[first:last] - start]

    def features_of(self, index: Tensor) -> Tensor:
        """(len(index), D) features of images whose features are kept."""
        return self.features[torch.searchsorted(self._sampled, index)]


@dataclass(frozen=True)
class Seen:
    """What a model says of both splits; images that are borrowed from the test are in neither."""

    train: Said
    test: Said

    @classmethod
    def by(cls, model: nn.Module, work: Workspace, name: str) -> Seen:
        """The predictions of ``model``; ``name`` is for the progress."""
        return cls.with_mask(model, work, name, None)[0]

    @classmethod
    def with_mask(
        cls, model: nn.Module, work: Workspace, name: str, classes: list[int] | None
    ) -> tuple[Seen, Seen | None]:
        """The predictions of ``model``, and those with the logits of ``classes`` masked, in one pass."""
        chosen, data = Chosen.of(work), work.data
        plain, masked = [], []
        kept = (
            (data.train, data.own, work.request.forget, chosen.train),
            (data.test, len(data.test), _NOBODY, chosen.test),
        )
        for split, number, outputs, sampled in kept:
            sides = [Said(number, len(data.classes), outputs, sampled) for _ in range(1 if classes is None else 2)]
            passes = training.outputs(
                model,
                split,
                torch.arange(number),
                classes=len(data.classes),
                batch=work.eval_batch,
                device=work.device,
                label=f"eval {name}",
                crew=work.crew,
                track=work.track,
            )
            for positions, says in passes:
                start, labels = int(positions[0]), split.labels[positions]
                sides[0].add(start, says.logits, says.features, labels)
                if classes is not None:
                    sides[1].add(start, mask(says.logits, classes), says.features, labels)
            plain.append(sides[0])
            masked.append(sides[-1])
        return cls(*plain), None if classes is None else cls(*masked)


_NOBODY = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Chosen:
    """The images whose features an evaluation looks at, sorted positions: all there are, or a sample of them.

    Attributes:
        probed: Training images that train the probe; nothing that an earlier request has forgotten.
        forget: Of D_f, for CKA.
        retain: Of D_r, for CKA.
        gone: Test images of the forgotten classes, for the probe.
        drawn: Test images in the report's plane.
    """

    probed: Tensor
    forget: Tensor
    retain: Tensor
    gone: Tensor
    drawn: Tensor

    @classmethod
    def of(cls, work: Workspace) -> Chosen:
        """The choice for a run; the same for every model."""
        data, request, most = work.data, work.request, work.config.eval.probe_samples

        def some(purpose: str, index: Tensor, number: int = most) -> Tensor:
            draw = generator(work.config.seed, "eval", purpose)
            return index[torch.randperm(len(index), generator=draw)[:number]].sort()[0]

        kinds, _ = _told_apart(work)
        probed = torch.ones(len(data.train), dtype=torch.bool)
        probed[request.already] = False
        probed[data.own :] = False
        owners = kinds[request.forget].unique()
        others = torch.tensor(sorted({*kinds.unique().tolist()} - {*owners.tolist()}), dtype=torch.int64)
        if len(others) > _PROBED_CLASSES:
            probed &= torch.isin(kinds, torch.cat([owners, some("probe classes", others, _PROBED_CLASSES)]))
        gone = torch.isin(data.test.concepts, torch.tensor(request.concepts, dtype=torch.int64))
        return cls(
            probed=some("probe", torch.where(probed)[0]),
            forget=some("cka forget", request.forget),
            retain=some("cka retain", request.retain),
            gone=some("probe test", torch.where(gone)[0]),
            drawn=some("plane", torch.arange(len(data.test)), _DRAWN),
        )

    @property
    def train(self) -> Tensor:
        """All positions in the training split."""
        return _together(self.probed, self.forget, self.retain)

    @property
    def test(self) -> Tensor:
        """All positions in the test split."""
        return _together(self.gone, self.drawn)


def _told_apart(work: Workspace) -> tuple[Tensor, Tensor]:
    """(N,) and (N_test,) what the probe tells apart: classes, or for a forgotten sub-class all sub-classes.

    A sub-class's class stays: that a probe finds it says nothing.
    """
    train, test, request = work.data.train, work.data.test, work.request
    part = any(int(work.data.concept_class[c]) not in request.classes for c in request.concepts)
    if request.kind == "subclasses" or part:
        return train.concepts, test.concepts
    return train.labels, test.labels


def _together(*positions: Tensor) -> Tensor:
    result: Tensor = torch.cat(positions).unique()
    return result


def fresh(work: Workspace, purpose: str) -> nn.Module:
    """A newly initialised model: every random layer anew, another one for each purpose and seed."""
    with seeded(work.config.seed, purpose, "init"):
        return work.build()


def ignorant(work: Workspace) -> Tensor:
    """(N_f, K) probabilities on D_f of a randomly initialised model in eval mode, for `distance.zrf`."""
    data = work.data
    passes = training.outputs(
        fresh(work, "zrf").eval(),
        data.train,
        work.request.forget,
        classes=len(data.classes),
        batch=work.eval_batch,
        device=work.device,
    )
    return torch.cat([says.logits.softmax(1) for _, says in passes])


def metrics(seen: Seen, work: Workspace, random: Tensor) -> Figures:
    """The metrics of one model by itself; see docs/metrics.md.

    Args:
        seen: What the model says.
        work: Data, request and settings.
        random: From `ignorant`.
    """
    data, request, settings = work.data, work.request, work.config.eval
    y, y_test = data.train.labels, data.test.labels
    gone = torch.isin(data.test.concepts, torch.tensor(request.concepts, dtype=torch.int64))
    same = torch.isin(data.test.concepts, torch.tensor(request.asked, dtype=torch.int64))
    train, test, chosen = seen.train, seen.test, Chosen.of(work)
    kinds, kinds_test = _told_apart(work)
    unsure, unsure_test = train.entropy, test.entropy

    draw = generator(work.config.seed, "eval", "attack")
    number = min(settings.attack_samples, len(request.retain), int((~gone).sum()))
    members = request.retain[torch.randperm(len(request.retain), generator=draw)[:number]]
    others = torch.randperm(int((~gone).sum()), generator=draw)[:number]
    loss = membership.sample_loss(train.sure[request.forget])
    unseen = membership.sample_loss(test.sure[same])
    retained, forgotten, known = unsure[request.retain], unsure[request.forget], unsure_test[~gone]
    figures = {
        "retain_train_acc": accuracy.accuracy(train.predicted[request.retain], y[request.retain]),
        "forget_train_acc": accuracy.accuracy(train.predicted[request.forget], y[request.forget]),
        "retain_test_acc": accuracy.accuracy(test.predicted[~gone], y_test[~gone]),
        "forget_test_acc": accuracy.accuracy(test.predicted[gone], y_test[gone]),
        "mia_entropy_lr": membership.mia_entropy_lr(retained, known, forgotten),
        "mia_entropy_lr_ssd": membership.mia_entropy_lr_ssd(retained, unsure_test, forgotten),
        "mia_confidence_svc": membership.mia_confidence_svc(
            train.sure[members], test.sure[~gone][others], train.sure[request.forget]
        ),
        "mia_loss_auc": membership.mia_loss_auc(loss, unseen),
        "mia_loss_tpr_at_1fpr": membership.mia_loss_tpr_at_1fpr(loss, unseen),
        "zrf": distance.zrf(train.logits.softmax(1), random),
        "probe_acc": probe.probe_acc(
            train.features_of(chosen.probed),
            kinds[chosen.probed],
            test.features_of(chosen.gone),
            kinds_test[chosen.gone],
        ),
    }
    if len(request.already):
        figures["already_train_acc"] = accuracy.accuracy(train.predicted[request.already], y[request.already])
    return figures


def compared(seen: Seen, own: Mapping[str, float | None], oracle: Seen, target: Mapping[str, float | None],
             work: Workspace) -> Figures:  # fmt: skip
    """The metrics of a model beside the oracle.

    Args:
        seen: What the model says.
        own: Its `metrics`.
        oracle: What the oracle says.
        target: The oracle's `metrics`.
        work: The request.
    """
    p, q = seen.train.logits.softmax(1), oracle.train.logits.softmax(1)
    return {
        "js_divergence": distance.js_divergence(p, q),
        "activation_distance": distance.activation_distance(p, q),
        "agreement": distance.agreement(p, q),
        "avg_gap": distance.avg_gap(own, target),
        "tow": distance.tow(own, target),
    }


def entangled(seen: Seen, original: Seen, work: Workspace) -> Figures:
    """How near the forgotten classes' features lie to the retained ones', and how far features moved.

    ``centroid_cosine``: mean cosine between centroids of classes in D_f and of the other classes; ``cka_forget`` and
    ``cka_retain``: linear CKA with the original's features on D_f and D_r.
    """
    data, request, chosen = work.data, work.request, Chosen.of(work)
    rows = data.train.labels[request.forget].unique().tolist()
    others = {*range(len(data.classes))} - {*rows, *request.classes}

    def cka(index: Tensor) -> float | None:
        return entanglement.linear_cka(seen.train.features_of(index), original.train.features_of(index))

    return {
        "centroid_cosine": entanglement.mean_cosine(seen.train.sums, rows, sorted(others)),
        "cka_forget": cka(chosen.forget),
        "cka_retain": cka(chosen.retain),
    }


def relearned(models: Mapping[str, nn.Module], target: float, work: Workspace) -> dict[str, int | None]:
    """Epochs in which each model relearns D_f; empty unless ``eval.relearn_epochs`` asks for it."""
    limit = work.config.eval.relearn_epochs
    if not limit:
        return {}
    return {
        name: relearning.relearn_epochs(
            model,
            work.data.train,
            work.request.forget,
            target,
            limit=limit,
            seed=work.config.seed,
            eval_batch=work.eval_batch,
            device=work.device,
            track=work.track,
        )
        for name, model in models.items()
    }


def per_class(seen: Mapping[str, Seen], names: Iterable[str], work: Workspace) -> dict[str, Any]:
    """Accuracy per class of each model on both splits."""
    data = work.data
    sides = {"train": data.train.labels[: data.own], "test": data.test.labels}
    return {
        name: {
            split: dict(zip(
                data.classes,
                accuracy.per_class_accuracy(getattr(seen[name], split).predicted, labels, len(data.classes)),
                strict=True,
            ))
            for split, labels in sides.items()
        }
        for name in names
    }  # fmt: skip


def described(work: Workspace) -> dict[str, Any]:
    """The request in words and numbers."""
    data, request = work.data, work.request
    return {
        "kind": request.kind,
        "classes": [data.classes[c] for c in request.classes],
        "concepts": [data.concepts[c] for c in request.concepts],
        "forget": len(request.forget),
        "retain": len(request.retain),
        **({"already": len(request.already)} if len(request.already) else {}),
    }


def aggregated(seen: Mapping[str, Seen], perturbing: Tensor | None, work: Workspace) -> dict[str, Any]:
    """What the report draws, so that it needs neither models nor images.

    Args:
        seen: What each model says.
        perturbing: (N_f,) the perturbing labels, where they are known.
        work: Data, request and settings.
    """
    data, request = work.data, work.request
    y, y_test = data.train.labels, data.test.labels
    # The same classes as the forgotten images', never seen: what the forgotten ones are to look like.
    unseen = torch.where(torch.isin(data.test.concepts, torch.tensor(request.asked)))[0]
    groups = {"forgotten": ("train", request.forget), "retained": ("train", request.retain), "unseen": ("test", unseen)}
    models = [name for name in ("original", "unlearned", "oracle") if name in seen]
    drawn = Chosen.of(work).drawn
    planes: dict[str, Any] = {}
    for name in models:
        features = seen[name].test.features_of(drawn)
        planes[name] = aggregates.plane(features, y_test[drawn], onto=planes.get("original"))
    now = seen["unlearned"].train.predicted[request.forget]
    return {
        "histograms": {
            name: {
                group: aggregates.histograms(said.loss[index], said.entropy[index], len(data.classes))
                for group, (split, index) in groups.items()
                for said in [getattr(seen[name], split)]
            }
            for name in models
        },
        "images": {group: len(index) for group, (_, index) in groups.items()},
        "flow": aggregates.flow(y[request.forget], perturbing, now),
        "plane": {
            "labels": y_test[drawn].tolist(),
            **{name: [[round(float(v), 3) for v in point] for point in planes[name]] for name in models},
        },
    }
