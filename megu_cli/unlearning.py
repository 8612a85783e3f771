"""The method put together: from a request, a model and similarity ratings to an unlearned model, in four steps.

The stages of the command line and `megu_cli.unlearn` both call these; neither files nor configs of a whole run are
known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import training
from megu_cli.config import FinetuneConfig, LabelsConfig, NoiseConfig, TransitionConfig
from megu_cli.data import Dataset
from megu_cli.errors import ConfigError
from megu_cli.forget import Request
from megu_cli.method import finetune as fragment_align
from megu_cli.method import labels as perturbing
from megu_cli.method import unseen
from megu_cli.method.noise import train_noise
from megu_cli.method.transition import transition_matrix
from megu_cli.models import has_head
from megu_cli.processes import ALONE, Crew
from megu_cli.runtime import Track, generator, silent
from megu_cli.training import Checkpoints, History

# Of the finetuning's sizes where they are left to megu: retained samples an epoch, but not more than so many passes
# over them; passes over D_f in all.
_RETAINED = 12_000
_PASSES = 20
_FORGET_PASSES = 3


@dataclass(frozen=True)
class Problem:
    """What is to be forgotten of which data, and how.

    Attributes:
        data: The data set; only its training split is read.
        request: The forget request, resolved against it.
        transition: Settings of the transition matrix.
        labels: Settings of the perturbing labels.
        noise: Settings of the noise pair.
        finetune: Settings of the finetuning.
        seed: Of everything random.
        eval_batch: Samples per forward pass where nothing is learned.
        device: Where to compute; the models given are there.
        checkpoints: Of the finetuning.
        crew: The processes that share noise and finetuning.
        track: Reports progress.
    """

    data: Dataset
    request: Request
    transition: TransitionConfig
    labels: LabelsConfig
    noise: NoiseConfig
    finetune: FinetuneConfig
    seed: int = 0
    eval_batch: int = 1000
    device: torch.device | str = "cpu"
    checkpoints: Checkpoints | None = field(default=None, compare=False)
    crew: Crew = field(default=ALONE, compare=False)
    track: Track = field(default=silent, compare=False)

    @property
    def true(self) -> Tensor:
        """(N_f,) true labels of D_f."""
        return self.data.train.labels[self.request.forget]

    @property
    def concepts(self) -> Tensor:
        """(N_f,) concepts of D_f."""
        return self.data.train.concepts[self.request.forget]

    @property
    def retain_samples(self) -> int:
        """Retained samples per epoch of the finetuning."""
        settings = self.finetune
        if settings.retain_fraction == "auto":
            return min(_RETAINED, _PASSES * len(self.request.retain))
        return max(settings.batch, round(settings.retain_fraction * len(self.request.retain)))

    @property
    def forget_batch(self) -> int:
        """Forgotten samples per step of the finetuning."""
        return self.forget_batch_in(self.finetune.epochs)

    def forget_batch_in(self, epochs: int) -> int:
        """Forgotten samples per step of a training of so many epochs, each as long as one of the finetuning."""
        settings = self.finetune
        if settings.forget_batch != "auto":
            return settings.forget_batch
        # What is shown too often is learned by heart, with its perturbing labels.
        steps = epochs * math.ceil(self.retain_samples / settings.batch)
        return min(64, max(8, math.ceil(_FORGET_PASSES * len(self.request.forget) / steps)))

    @property
    def weight(self) -> float:
        """Weight of the loss on forgotten samples."""
        if self.finetune.weight != "auto":
            return self.finetune.weight
        return 0.1 if self.label_mode == "hard" else 0.2

    @property
    def label_mode(self) -> str:
        """How perturbing labels are made: ``hard``, ``sample``, ``soft`` or ``matched``."""
        if self.labels.mode != "auto":
            return self.labels.mode
        return "hard" if self.request.kind == "classes" else "matched"

    @property
    def has_stand_in(self) -> bool:
        """Whether labels ask a judge that never saw what is forgotten (`unseen.stand_in`)."""
        return bool(self.labels.stand_in) and self.labels.source == "transition+prediction"

    @property
    def foresees_loss(self) -> bool:
        """Whether labels keep less than held-out images say: by what goes with a sub-class (`unseen.left_right`)."""
        auto = self.label_mode == "matched" and self.labels.keep == "auto"
        return auto and self.has_stand_in and self.request.kind == "subclasses"

    @property
    def noise_use(self) -> str:
        """Which noises are trained: ``both``, ``positive``, ``negative`` or ``none``."""
        if self.noise.use != "auto":
            return self.noise.use
        return "negative" if self.request.kind == "classes" else "none"


@dataclass(frozen=True)
class Labels:
    """Perturbing labels of D_f.

    Attributes:
        mode: How they were made; see `Problem.label_mode`.
        perturbing: (N_f,) int64 labels; where they are soft, the best-scored ones.
        target: (N_f, K) float32 distributions, where they are soft.
        keep: Concept -> how much of the true label its images keep; empty where they are hard.
    """

    mode: str
    perturbing: Tensor
    target: Tensor | None = None
    keep: dict[str, float] = field(default_factory=dict)


def transition(
    problem: Problem, candidates: Mapping[str, Sequence[str]], scores: Mapping[str, Mapping[str, float]]
) -> Tensor:
    """The transition matrix of the concepts that are asked about.

    Args:
        problem: The request.
        candidates: Asked concept, in the request's order -> the concepts that it is compared with.
        scores: Asked concept -> candidate -> rating from 0 to 10; what is not rated can be no label. With a single
            candidate none is needed.

    Returns:
        (len(asked), K) float64, each row summing to 1.
    """
    data, request = problem.data, problem.request
    ratings = torch.full((len(request.asked), len(data.concepts)), float("nan"), dtype=torch.float64)
    place = {name: i for i, name in enumerate(data.concepts)}
    for row, (concept, compared) in enumerate(candidates.items()):
        for candidate in compared:
            rating = 0.0 if len(compared) == 1 else scores[concept].get(candidate)
            if rating is not None:
                ratings[row, place[candidate]] = rating
    return transition_matrix(
        ratings,
        request.asked,
        data.concept_class,
        classes=len(data.classes),
        forgotten=request.concepts,
        own_class=request.kind == "subclasses",
        temperature=problem.transition.temperature,
    )


def perturb(problem: Problem, model: nn.Module, matrix: Tensor) -> Labels:
    """A perturbing label, or a distribution over labels, for each forgotten sample.

    Args:
        problem: The request and ``labels``.
        model: The original model, in eval mode.
        matrix: From `transition`.

    Raises:
        ConfigError: ``labels.keep: auto`` has no held-out images to look at.
    """
    settings, mode = problem.labels, problem.label_mode
    logits = _says(problem, model, problem.request.forget)
    looks = _stand_in(problem)
    scores = perturbing.label_scores(
        _rows(problem, matrix),
        logits.log_softmax(1),
        settings.source,
        settings.alpha,
        0.0 if looks is None else settings.stand_in * looks,
    )
    draw = generator(problem.seed, "labels")
    hard = perturbing.hard_labels(scores, settings.source, draw)
    if mode == "hard":
        return Labels(mode, hard)
    concepts, names = problem.concepts, problem.data.concepts
    keep = _keep(problem, model, mode, logits, looks)
    told = {names[c]: float(keep[concepts == c].mean()) for c in problem.request.asked}
    target = unseen.soft_labels(scores, problem.true, keep)
    if mode == "matched":
        return Labels(mode, target.argmax(1), target.float(), told)
    if mode == "sample":
        return Labels(mode, perturbing.draw_labels(target, draw), None, told)
    return Labels(mode, hard, target.float(), told)


def _keep(problem: Problem, model: nn.Module, mode: str, logits: Tensor, looks: Tensor | None) -> Tensor:
    """(N_f,) how much of its true label each forgotten sample keeps; nothing where the class is wholly forgotten."""
    data, given, request = problem.data, problem.labels.keep, problem.request
    rank = unseen.ranks([logits] if looks is None else [logits, looks], problem.true, problem.concepts)
    if given == "auto":
        held_out = request.held_out(data)
        if not len(held_out):
            raise ConfigError(
                "labels.keep: auto looks at held-out images, and there are none",
                "Raise data.validation, or give labels.keep a number from 0 to 1.",
            )
        there, concepts = data.train.labels[held_out], data.train.concepts[held_out]
        sure = _says(problem, model, held_out).double().softmax(1).gather(1, there[:, None])[:, 0]
        if mode == "matched":
            left = {}
            if problem.foresees_loss:
                left = unseen.left_right(data.train, request.retain, request.forget, **_shared(problem))
            keep = unseen.as_unseen(rank, problem.concepts, sure, concepts, left)
        else:
            keep = unseen.by_concept(sure, concepts, problem.concepts)
    elif mode == "matched":
        keep = (rank >= 1 - given).double()
    else:
        keep = torch.full(problem.true.shape, given, dtype=torch.float64)
    return keep.masked_fill(torch.isin(problem.true, torch.tensor(request.classes, dtype=torch.int64)), 0)


def _stand_in(problem: Problem) -> Tensor | None:
    """(N_f, K): log-probabilities of `unseen.stand_in`; nothing where the labels go without it."""
    if not problem.has_stand_in:
        return None
    data, request = problem.data, problem.request
    return unseen.stand_in(data.train, request.retain, request.forget, len(data.classes), **_shared(problem))


def _shared(problem: Problem) -> dict[str, Any]:
    return {"batch": problem.eval_batch, "seed": problem.seed, "device": problem.device, "track": problem.track}


def _says(problem: Problem, model: nn.Module, index: Tensor) -> Tensor:
    """Logits of the original model on training images."""
    outputs = training.predict(
        model,
        problem.data.train,
        index,
        classes=len(problem.data.classes),
        batch=problem.eval_batch,
        features=False,
        device=problem.device,
        label="labels",
        track=problem.track,
    )
    return outputs.logits


def _rows(problem: Problem, matrix: Tensor) -> Tensor:
    """(N_f, K): each forgotten sample's row of the transition matrix."""
    row = torch.full((len(problem.data.concepts),), -1)
    row[torch.tensor(problem.request.asked)] = torch.arange(len(problem.request.asked))
    return matrix[row[problem.concepts]]


def noise_pair(problem: Problem, model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """The positive-negative feature noise pair.

    Args:
        problem: The request, ``noise`` and the batch size of ``finetune``.
        model: The original model; it is not changed.
        labels: (N_f,) perturbing labels.

    Returns:
        For each noise in use, ``positive`` and ``negative``, (G, R, C, H, W) float32 noises, and as ``*_class`` the
        (G,) classes that they belong to; empty where none is in use.
    """
    settings, request, use = problem.noise, problem.request, problem.noise_use
    pair: dict[str, Tensor] = {}

    def train(label: str, index: Tensor, group: Tensor, target: Tensor, away: bool) -> None:
        pair[label] = train_noise(
            model,
            problem.data.train,
            index,
            group,
            target,
            away=away,
            noises=settings.batch,
            steps=settings.steps,
            batch=problem.finetune.batch,
            lr=settings.lr,
            penalty=settings.penalty,
            seed=problem.seed,
            label=label,
            device=problem.device,
            crew=problem.crew,
            track=problem.track,
        )
        pair[f"{label}_class"] = target

    if use in ("both", "positive"):
        target, group = labels.unique(return_inverse=True)
        train("positive", request.forget, group, target, away=False)
    if use in ("both", "negative"):
        target, group = problem.true.unique(return_inverse=True)
        away = settings.negative == "away"
        # Carrying noise is put on retained images, away noise on the forgotten ones of its class.
        # Each class needs one: with fewer retained images than forgotten classes, they serve several.
        index = request.forget if away else request.retain.repeat(-(-len(target) // len(request.retain)))
        train("negative", index, group if away else torch.arange(len(index)) % len(target), target, away)
    return pair


def align(problem: Problem, model: nn.Module, matrix: Tensor, labels: Labels, pair: Mapping[str, Tensor]) -> History:
    """Fragment-Align: finetune ``model`` in place; it starts as the original model and ends unlearned, in eval mode.

    Args:
        problem: The request, ``finetune`` and ``noise.strength``.
        model: The model.
        matrix: From `transition`.
        labels: From `perturb`.
        pair: From `noise_pair`.
    """
    settings, data, request = problem.finetune, problem.data, problem.request
    hard, source = labels.perturbing, problem.labels.source
    rows = _rows(problem, matrix)
    log_prior = rows.log() * settings.beta if "transition" in source else torch.zeros_like(rows)
    log_prior = log_prior.masked_fill(rows == 0, float("-inf"))  # with beta = 0, too, no label goes there
    target = functional.one_hot(hard, len(data.classes)).float() if labels.target is None else labels.target
    forgotten = fragment_align.Forgotten(
        index=request.forget,
        target=target,
        log_prior=log_prior,
        positive=_groups(hard, pair.get("positive_class")),
        negative=_groups(problem.true, pair.get("negative_class")),
    )

    def validate(net: nn.Module) -> float:
        return training.accuracy(net, data.train, request.validation, problem.device, problem.crew, problem.eval_batch)

    return fragment_align.finetune(
        model,
        data.train,
        request.retain,
        forgotten,
        positive=pair.get("positive"),
        negative=pair.get("negative"),
        uniform=problem.noise.strength == "uniform",
        clean=settings.clean,
        reassign=settings.reassign and labels.mode == "hard" and "prediction" in source,
        weight=problem.weight,
        adversary=settings.adversary if labels.mode == "hard" and has_head(model, len(data.classes)) else 0.0,
        epochs=settings.epochs,
        retain_samples=problem.retain_samples,
        batch=settings.batch,
        forget_batch=problem.forget_batch,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        seed=problem.seed,
        validate=validate if len(request.validation) else None,
        patience=settings.patience,
        max_steps=settings.max_steps,
        checkpoints=problem.checkpoints,
        device=problem.device,
        crew=problem.crew,
        track=problem.track,
    )


def _groups(value: Tensor, classes: Tensor | None) -> Tensor:
    """Position of each value in the sorted ``classes``."""
    return torch.zeros_like(value) if classes is None else torch.searchsorted(classes, value)
