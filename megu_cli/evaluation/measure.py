"""Measure models: collect their predictions on both splits, and compute every metric of the registry from them.

No model is changed. The classes here are the input of every metric's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import training
from megu_cli.config import EvalConfig
from megu_cli.data import Dataset
from megu_cli.errors import MeguError
from megu_cli.evaluation import accuracy, aggregates, distance, entanglement, membership
from megu_cli.evaluation.registry import Group, NotApplicable, loaded, metrics
from megu_cli.evaluation.verdict import verdict
from megu_cli.evaluation.warnings import warnings
from megu_cli.execution import Execution
from megu_cli.execution.runtime import generator
from megu_cli.request.resolve import Request

# Test images in the report's planes: enough to see shapes, few enough to draw.
_DRAWN = 800
# Classes that the probe tells the forgotten ones from, at most: a regression on 12,000 classes would take hours.
_PROBED_CLASSES = 200

Figures = dict[str, float | None]
_NOBODY = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class EvaluationProblem:
    """The forget request and the settings that models are measured with.

    Attributes:
        data: The data set.
        request: The forget request, resolved against it.
        settings: The config's section ``eval``.
        build: Returns a newly initialised model for a purpose; another one for each purpose.
        execution: Where and how to compute; its processes share the predictions.
    """

    data: Dataset
    request: Request
    settings: EvalConfig
    build: Callable[[str], nn.Module]
    execution: Execution = field(default_factory=Execution)

    @cached_property
    def sample(self) -> EvaluationSample:
        """The images whose features are kept."""
        return EvaluationSample.of(self)

    @cached_property
    def forgotten_test(self) -> Tensor:
        """(N_test,) bool: test images of the wholly forgotten concepts."""
        return torch.isin(self.data.test.concepts, torch.tensor(self.request.concepts, dtype=torch.int64))

    @cached_property
    def similar_test(self) -> Tensor:
        """(N_test,) bool: test images of the concepts that the forgotten images belong to."""
        return torch.isin(self.data.test.concepts, torch.tensor(self.request.asked, dtype=torch.int64))

    @cached_property
    def probe_labels(self) -> tuple[Tensor, Tensor]:
        """(N,) and (N_test,) labels of the probe: classes, or all sub-classes if a sub-class is forgotten.

        The class of a forgotten sub-class stays, so a probe that finds the class shows nothing.
        """
        train, test, request = self.data.train, self.data.test, self.request
        part = any(int(self.data.concept_class[c]) not in request.classes for c in request.concepts)
        if request.kind == "subclasses" or part:
            return train.concepts, test.concepts
        return train.labels, test.labels

    @cached_property
    def attack_sample(self) -> tuple[Tensor, Tensor]:
        """Positions of equally many retained training images, and retained test images among all of these."""
        retained = int((~self.forgotten_test).sum())
        draw = generator(self.execution.seed, "eval", "attack")
        number = min(self.settings.attack_samples, len(self.request.retain), retained)
        members = self.request.retain[torch.randperm(len(self.request.retain), generator=draw)[:number]]
        return members, torch.randperm(retained, generator=draw)[:number]

    @cached_property
    def untrained(self) -> Tensor:
        """(N_f, K) probabilities on D_f of a randomly initialised model in eval mode, for `distance.zrf`."""
        passes = training.outputs(
            self.build("zrf").eval(),
            self.data.train,
            self.request.forget,
            classes=len(self.data.classes),
            execution=self.execution.unshared,
        )
        return torch.cat([batch.logits.softmax(1) for _, batch in passes])


@dataclass(frozen=True)
class EvaluationSample:
    """The images whose features an evaluation looks at, sorted positions: all there are, or a sample of them.

    Attributes:
        probed: Training images that train the probe; nothing that an earlier request has forgotten.
        forget: Images of D_f, for CKA.
        retain: Images of D_r, for CKA.
        forgotten_test: Test images of the forgotten concepts, for the probe.
        drawn: Test images in the report's plane.
    """

    probed: Tensor
    forget: Tensor
    retain: Tensor
    forgotten_test: Tensor
    drawn: Tensor

    @classmethod
    def of(cls, problem: EvaluationProblem) -> EvaluationSample:
        """The sample of a problem; the same for every model."""
        data, request, most = problem.data, problem.request, problem.settings.probe_samples

        def some(purpose: str, index: Tensor, number: int = most) -> Tensor:
            draw = generator(problem.execution.seed, "eval", purpose)
            return index[torch.randperm(len(index), generator=draw)[:number]].sort()[0]

        kinds, _ = problem.probe_labels
        probed = torch.ones(len(data.train), dtype=torch.bool)
        probed[request.already] = False
        owners = kinds[request.forget].unique()
        others = torch.tensor(sorted({*kinds.unique().tolist()} - {*owners.tolist()}), dtype=torch.int64)
        if len(others) > _PROBED_CLASSES:
            probed &= torch.isin(kinds, torch.cat([owners, some("probe classes", others, _PROBED_CLASSES)]))
        return cls(
            probed=some("probe", torch.where(probed)[0]),
            forget=some("cka forget", request.forget),
            retain=some("cka retain", request.retain),
            forgotten_test=some("probe test", torch.where(problem.forgotten_test)[0]),
            drawn=some("plane", torch.arange(len(data.test)), _DRAWN),
        )

    @property
    def train(self) -> Tensor:
        """All positions in the training split."""
        return _together(self.probed, self.forget, self.retain)

    @property
    def test(self) -> Tensor:
        """All positions in the test split."""
        return _together(self.forgotten_test, self.drawn)


def _together(*positions: Tensor) -> Tensor:
    result: Tensor = torch.cat(positions).unique()
    return result


class SplitPredictions:
    """Predictions of a model on one split: four figures of every image, and logits and features of a few.

    Logits and features of all images would take memory with the size of the data set: K + D numbers an image.

    Args:
        number: Images N.
        classes: Classes K.
        with_logits: Sorted positions whose logits are kept.
        with_features: Sorted positions whose penultimate features are kept.

    Attributes:
        predicted: (N,) int32, the class of the largest logit.
        entropy: (N,) float64 of the output, in nats.
        confidence: (N,) probability of the true class.
        loss: (N,) cross-entropy in nats.
        logits: (len(with_logits), K).
        features: (len(with_features), D).
        sums: (K, D), `entanglement.class_sums` of all images.
    """

    def __init__(self, number: int, classes: int, with_logits: Tensor, with_features: Tensor) -> None:
        self.predicted = torch.empty(number, dtype=torch.int32)
        self.entropy = torch.empty(number, dtype=torch.float64)
        self.confidence, self.loss = torch.empty(2, number)
        self.logits = torch.empty(len(with_logits), classes)
        self.features = torch.empty(0, 0)
        self.sums = torch.zeros(classes, 0, dtype=torch.float64)
        self._with_logits, self._with_features = with_logits, with_features

    def add(self, start: int, logits: Tensor, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

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
        self.confidence[here] = p.gather(1, labels[:, None])[:, 0]
        self.loss[here] = functional.cross_entropy(logits, labels, reduction="none")
        if not start:
            self.features = torch.empty(len(self._with_features), features.shape[1])
            self.sums = torch.zeros(len(self.sums), features.shape[1], dtype=torch.float64)
        self.sums += entanglement.class_sums(features, labels, len(self.sums))
        kept = ((self._with_logits, self.logits, logits), (self._with_features, self.features, features))
        for positions, target, values in kept:
            first, last = torch.searchsorted(positions, torch.tensor([here.start, here.stop])).tolist()
            target[first:last] = values[positions[first:last] - start]

    def features_of(self, index: Tensor) -> Tensor:
        """(len(index), D) features of images whose features are kept."""
        return self.features[torch.searchsorted(self._with_features, index)]


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model on both splits, without the held-out images."""

    train: SplitPredictions
    test: SplitPredictions

    @classmethod
    def of(cls, model: nn.Module, problem: EvaluationProblem, name: str) -> Predictions:
        """The predictions of ``model``; ``name`` is for the progress."""
        return cls._both(model, problem, name, None)[0]

    @classmethod
    def with_mask(
        cls, model: nn.Module, problem: EvaluationProblem, name: str, mask: Callable[[Tensor], Tensor]
    ) -> tuple[Predictions, Predictions]:
        """The predictions of ``model``, and those from its logits (B, K) after ``mask``, in one pass."""
        return cls._both(model, problem, name, mask)

    @classmethod
    def _both(
        cls, model: nn.Module, problem: EvaluationProblem, name: str, mask: Callable[[Tensor], Tensor] | None
    ) -> tuple[Predictions, Predictions]:
        data, sample = problem.data, problem.sample
        plain, masked = [], []
        kept = (
            (data.train, len(data.train), problem.request.forget, sample.train),
            (data.test, len(data.test), _NOBODY, sample.test),
        )
        for split, number, with_logits, with_features in kept:
            sides = [
                SplitPredictions(number, len(data.classes), with_logits, with_features) for _ in range(2 if mask else 1)
            ]
            passes = training.outputs(
                model,
                split,
                torch.arange(number),
                classes=len(data.classes),
                label=f"eval {name}",
                execution=problem.execution,
            )
            for positions, batch in passes:
                start, labels = int(positions[0]), split.labels[positions]
                sides[0].add(start, batch.logits, batch.features, labels)
                if mask:
                    sides[1].add(start, mask(batch.logits), batch.features, labels)
            plain.append(sides[0])
            masked.append(sides[-1])
        return cls(*plain), cls(*masked)


@dataclass(frozen=True)
class Measurement:
    """One model under evaluation: the input of every metric's function.

    Attributes:
        problem: The forget request and the settings.
        predictions: The model's predictions.
        original: The original model's predictions.
        model: The model itself, for metrics that train it; ``None``: they do not apply.
        unlearned: True for the model that this run has unlearned.
        perturbing: (N_f,) the perturbing labels that it was unlearned with, if they are known.
    """

    problem: EvaluationProblem
    predictions: Predictions
    original: Predictions
    model: nn.Module | None = None
    unlearned: bool = False
    perturbing: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """(N_f, K) probabilities on D_f."""
        return self.predictions.train.logits.softmax(1)

    @cached_property
    def figures(self) -> Figures:
        """The metrics of the model by itself."""
        return self._computed("model")

    @cached_property
    def entanglement(self) -> Figures:
        """Similarity of the forgotten to the retained classes' features, and how far features moved."""
        return self._computed("entanglement")

    def beside(self, oracle: Measurement) -> Figures:
        """The metrics of the model beside an oracle."""
        return self._computed("comparison", oracle)

    def intervals(self) -> dict[str, list[float]]:
        """95% intervals, as [low, high], of the figures that have one."""
        found = {m.name: loaded(m.interval)(self) for m in metrics("model") if m.interval is not None}
        return {name: list(interval) for name, interval in found.items() if interval is not None}

    def _computed(self, group: Group, *beside: Measurement) -> Figures:
        figures: Figures = {}
        for metric in metrics(group):
            if metric.function is not None:
                try:
                    value = loaded(metric.function)(self, *beside)
                except NotApplicable:
                    continue
                if value is not None and not math.isfinite(value):
                    raise MeguError(
                        f"the metric {metric.name} is {value}",
                        "The model may hold NaN or infinite weights.",
                    )
                figures[metric.name] = value
        return figures


def per_class(predictions: Predictions, data: Dataset) -> dict[str, dict[str, float | None]]:
    """Accuracy per class of a model on both splits."""
    sides = {
        "train": (predictions.train, data.train.labels),
        "test": (predictions.test, data.test.labels),
    }
    return {
        split: dict(zip(
            data.classes, accuracy.per_class_accuracy(side.predicted, labels, len(data.classes)), strict=True
        ))
        for split, (side, labels) in sides.items()
    }  # fmt: skip


def described(data: Dataset, request: Request) -> dict[str, Any]:
    """The request in words and numbers; ``copies`` are forgotten with the images that were asked for."""
    copies = int(torch.isin(request.copies, request.forget).sum())
    return {
        "kind": request.kind,
        "classes": [data.classes[c] for c in request.classes],
        "concepts": [data.concepts[c] for c in request.concepts],
        "forget": len(request.forget),
        "retain": len(request.retain),
        **({"already": len(request.already)} if len(request.already) else {}),
        **({"copies": copies} if copies else {}),
    }


def aggregated(models: Mapping[str, Measurement], problem: EvaluationProblem) -> dict[str, Any]:
    """What the report draws, so that it needs neither models nor images.

    Args:
        models: The models by name; the one named ``unlearned`` brings the perturbing labels.
        problem: The forget request and the settings.
    """
    data, request, drawn = problem.data, problem.request, problem.sample.drawn
    y, y_test = data.train.labels, data.test.labels
    # Images of the same classes that no model has seen: the forgotten ones are to look like these.
    unseen = torch.where(problem.similar_test)[0]
    groups = {"forgotten": ("train", request.forget), "retained": ("train", request.retain), "unseen": ("test", unseen)}
    shown = {name: models[name].predictions for name in ("original", "unlearned", "oracle") if name in models}
    planes: dict[str, Any] = {}
    for name, predictions in shown.items():
        features = predictions.test.features_of(drawn)
        planes[name] = aggregates.plane(features, y_test[drawn], onto=planes.get("original"))
    now = shown["unlearned"].train.predicted[request.forget]
    return {
        "histograms": {
            name: {
                group: aggregates.histograms(side.loss[index], side.entropy[index], len(data.classes))
                for group, (split, index) in groups.items()
                for side in [getattr(predictions, split)]
            }
            for name, predictions in shown.items()
        },
        "images": {group: len(index) for group, (_, index) in groups.items()},
        "flow": aggregates.flow(y[request.forget], models["unlearned"].perturbing, now),
        "plane": {
            "labels": y_test[drawn].tolist(),
            **{name: [[round(float(v), 3) for v in point] for point in planes[name]] for name in shown},
        },
    }


def evaluated(
    models: Mapping[str, Measurement], problem: EvaluationProblem, retrained_by: str | None = None
) -> dict[str, Any]:
    """All figures of a set of models, as eval.json holds them.

    Args:
        models: ``original``, ``mask``, ``unlearned`` and, where there is one, ``oracle``, in this order.
        problem: The forget request and the settings.
        retrained_by: Who retrained the model named ``unlearned``: ``megu``, ``factory`` (megu, from the weights of the
            user's factory) or ``user``; ``None``: it was unlearned.
    """
    oracle = models.get("oracle")
    figures = {
        **({"retrained_by": retrained_by} if retrained_by else {}),
        **{name: measurement.figures for name, measurement in models.items()},
        "intervals": {name: measurement.intervals() for name, measurement in models.items()},
        "per_class": {name: per_class(m.predictions, problem.data) for name, m in models.items()},
        "entanglement": {name: measurement.entanglement for name, measurement in models.items()},
        "comparison": {name: m.beside(oracle) for name, m in models.items() if m is not oracle} if oracle else {},
        "request": described(problem.data, problem.request),
        "aggregates": aggregated(models, problem),
    }
    nearer = None
    if oracle:
        p, masked, q = (m.probabilities for m in (models["unlearned"], models["mask"], oracle))
        nearer = distance.js_difference(p, masked, q)
    probed = len(problem.sample.forgotten_test)
    figures |= {"verdict": verdict(figures, probe_images=probed, nearer_than_mask=nearer)}
    found = warnings(figures)
    return figures | ({"warnings": found} if found else {})
