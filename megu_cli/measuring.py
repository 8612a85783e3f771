"""An evaluation put together: what models say of the data, and every metric of it. Models are never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megu_cli import training
from megu_cli.baselines.mask import mask
from megu_cli.evaluation import accuracy, aggregates, distance, entanglement, membership, probe, relearning
from megu_cli.runtime import generator, seeded
from megu_cli.workspace import Workspace

# What changes the figures of an evaluation, besides data, request and models.
SETTINGS = ("seed", "model.name", "eval.attack_samples", "eval.probe_samples", "eval.relearn_epochs")
VERSION = 2

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Seen:
    """What a model says of both splits."""

    train: training.Outputs
    test: training.Outputs

    @classmethod
    def by(cls, model: nn.Module, work: Workspace, name: str) -> Seen:
        """The predictions of ``model``; ``name`` is for the progress."""
        both = [
            training.predict(
                model,
                split,
                torch.arange(len(split)),
                classes=len(work.data.classes),
                batch=work.config.eval.batch,
                device=work.device,
                label=f"eval {name}",
                crew=work.crew,
                track=work.track,
            )
            for split in (work.data.train, work.data.test)
        ]
        return cls(*both)

    def masked(self, classes: list[int]) -> Seen:
        """The same with the logits of ``classes`` masked."""
        return Seen(*(training.Outputs(mask(o.logits, classes), o.features) for o in (self.train, self.test)))


def fresh(work: Workspace, purpose: str) -> nn.Module:
    """A newly initialised model: every random layer anew, another one for each purpose and seed."""
    with seeded(work.config.seed, purpose, "init"):
        return work.build()


def ignorant(work: Workspace) -> Tensor:
    """(N_f, K) probabilities on D_f of a randomly initialised model in eval mode, for `distance.zrf`."""
    data = work.data
    outputs = training.predict(
        fresh(work, "zrf").eval(),
        data.train,
        work.request.forget,
        classes=len(data.classes),
        batch=work.config.eval.batch,
        device=work.device,
    )
    return outputs.logits.softmax(1)


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
    p, p_all = seen.train.logits.softmax(1), seen.test.logits.softmax(1)
    p_test = p_all[~gone]

    draw = generator(work.config.seed, "eval", "attack")
    number = min(settings.attack_samples, len(request.retain), int((~gone).sum()))
    members = request.retain[torch.randperm(len(request.retain), generator=draw)[:number]]
    others = torch.randperm(len(p_test), generator=draw)[:number]
    sure = p.gather(1, y[:, None])[:, 0]
    sure_test = p_test.gather(1, y_test[~gone][:, None])[:, 0]
    loss = membership.sample_loss(p[request.forget], y[request.forget])
    unseen = membership.sample_loss(p_all[same], y_test[same])

    draw = generator(work.config.seed, "eval", "probe")
    probed = torch.randperm(len(y), generator=draw)[: settings.probe_samples]
    return {
        "retain_train_acc": accuracy.accuracy(seen.train.logits[request.retain], y[request.retain]),
        "forget_train_acc": accuracy.accuracy(seen.train.logits[request.forget], y[request.forget]),
        "retain_test_acc": accuracy.accuracy(seen.test.logits[~gone], y_test[~gone]),
        "forget_test_acc": accuracy.accuracy(seen.test.logits[gone], y_test[gone]),
        "mia_entropy_lr": membership.mia_entropy_lr(p[request.retain], p_test, p[request.forget]),
        "mia_entropy_lr_ssd": membership.mia_entropy_lr_ssd(p[request.retain], p_all, p[request.forget]),
        "mia_confidence_svc": membership.mia_confidence_svc(sure[members], sure_test[others], sure[request.forget]),
        "mia_loss_auc": membership.mia_loss_auc(loss, unseen),
        "mia_loss_tpr_at_1fpr": membership.mia_loss_tpr_at_1fpr(loss, unseen),
        "zrf": distance.zrf(p[request.forget], random),
        "probe_acc": probe.probe_acc(seen.train.features[probed], y[probed], seen.test.features[gone], y_test[gone]),
    }


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
    p = seen.train.logits[work.request.forget].softmax(1)
    q = oracle.train.logits[work.request.forget].softmax(1)
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
    data, request = work.data, work.request
    rows = data.train.labels[request.forget].unique().tolist()
    columns = [k for k in range(len(data.classes)) if k not in rows]
    cosines = entanglement.centroid_cosine(seen.train.features, data.train.labels, len(data.classes))

    def cka(index: Tensor) -> float | None:
        return entanglement.linear_cka(seen.train.features[index], original.train.features[index])

    return {
        "centroid_cosine": entanglement.mean_cosine(cosines, rows, columns),
        "cka_forget": cka(request.forget),
        "cka_retain": cka(request.retain),
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
            device=work.device,
            track=work.track,
        )
        for name, model in models.items()
    }


def per_class(seen: Mapping[str, Seen], names: Iterable[str], work: Workspace) -> dict[str, Any]:
    """Accuracy per class of each model on both splits."""
    data = work.data
    sides = {"train": data.train.labels, "test": data.test.labels}
    return {
        name: {
            split: dict(zip(
                data.classes,
                accuracy.per_class_accuracy(getattr(seen[name], split).logits, labels, len(data.classes)),
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
    }


# Test images in the report's planes: enough to see shapes, few enough to draw.
_DRAWN = 800


def aggregated(seen: Mapping[str, Seen], perturbing: Tensor | None, work: Workspace) -> dict[str, Any]:
    """What the report draws, so that it needs neither models nor images.

    Args:
        seen: What each model says.
        perturbing: (N_f,) the perturbing labels, where they are known.
        work: Data, request and settings.
    """
    data, request = work.data, work.request
    y, y_test = data.train.labels, data.test.labels
    truth = {"train": y, "test": y_test}
    # The same classes as the forgotten images', never seen: what the forgotten ones are to look like.
    unseen = torch.where(torch.isin(data.test.concepts, torch.tensor(request.asked)))[0]
    groups = {"forgotten": ("train", request.forget), "retained": ("train", request.retain), "unseen": ("test", unseen)}
    models = [name for name in ("original", "unlearned", "oracle") if name in seen]
    drawn = torch.randperm(len(y_test), generator=generator(work.config.seed, "eval", "plane"))[:_DRAWN].sort()[0]
    planes: dict[str, Any] = {}
    for name in models:
        features = seen[name].test.features[drawn]
        planes[name] = aggregates.plane(features, y_test[drawn], onto=planes.get("original"))
    now = seen["unlearned"].train.logits[request.forget].argmax(1)
    return {
        "histograms": {
            name: {
                group: aggregates.histograms(getattr(seen[name], split).logits[index], truth[split][index])
                for group, (split, index) in groups.items()
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
