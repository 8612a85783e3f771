"""The method put together: from a request, a model and similarity ratings to an unlearned model, in four steps.

The stages of the command line and `megu_cli.unlearn` both call these; neither files nor configs of a whole run are
known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import training
from megu_cli.config import FinetuneConfig, LabelsConfig, NoiseConfig, TransitionConfig
from megu_cli.data import Dataset
from megu_cli.errors import ConfigError, DataError, brief
from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.execution.runtime import Track, generator, silent
from megu_cli.method import finetune as fragment_align
from megu_cli.method import labels as perturbing
from megu_cli.method import proxy, unseen
from megu_cli.method.noise import train_noise
from megu_cli.method.transition import transition_matrix
from megu_cli.models.features import has_head
from megu_cli.request.resolve import Request
from megu_cli.training import Checkpoints, History

# Of the finetuning's sizes where they are left to megu: retained samples an epoch, but not more than so many passes
# over them; passes over D_f in all.
_RETAINED = 12_000
_PASSES = 20
_FORGET_PASSES = 3
# `labels.source: auto` takes the proxy where it is right at least half as often as the original on held-out images. The
# exponent of T: so much for each share that it is right less often, and at most that (docs/decisions.md).
_GOOD_ENOUGH, _RATINGS_BY_SHORTFALL, _MOST_RATINGS = 0.5, 8.0, 2.0
# A log-probability of the original below this counts as this.
_LEAST = -30.0


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
    crew: Processes = field(default=SINGLE, compare=False)
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
    def label_mode(self) -> str:
        """How perturbing labels are made: ``proxy``, ``hard``, ``sample``, ``soft`` or ``matched``.

        Where the proxy turns out poor and ``labels.source`` is ``auto``, `perturb` makes them by `plain_label_mode`.
        """
        given = self.labels
        auto = given.source == given.mode == given.keep == "auto"
        return "proxy" if auto or given.source == "proxy" else self.plain_label_mode

    @property
    def plain_label_mode(self) -> str:
        """How perturbing labels are made without the proxy."""
        if self.labels.mode != "auto":
            return self.labels.mode
        return "hard" if self.request.kind == "classes" else "matched"

    def weight(self, mode: str) -> float:
        """Weight of the loss on forgotten samples with labels made by ``mode``."""
        if self.finetune.weight != "auto":
            return self.finetune.weight
        return 0.1 if mode == "hard" else 0.2

    def noise_use(self, mode: str) -> str:
        """Which noises are trained for labels made by ``mode``: ``both``, ``positive``, ``negative`` or ``none``."""
        if self.noise.use != "auto":
            return self.noise.use
        return "negative" if self.request.kind == "classes" and mode == "hard" else "none"


@dataclass(frozen=True)
class Labels:
    """Perturbing labels of D_f.

    Attributes:
        mode: How they were made; see `Problem.label_mode`.
        perturbing: (N_f,) int64 labels; where they are soft, the best-scored ones.
        target: (N_f, K) float32 distributions, where they are soft.
        keep: Concept -> how much of the true label its images keep; empty where they are hard.
        proxy: How the proxy did on held-out images and what follows from it; empty where it was not asked.
    """

    mode: str
    perturbing: Tensor
    target: Tensor | None = None
    keep: dict[str, float] = field(default_factory=dict)
    proxy: dict[str, float] = field(default_factory=dict)


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

    Raises:
        DataError: A concept has no rating at all.
    """
    data, request = problem.data, problem.request
    ratings = torch.full((len(request.asked), len(data.concepts)), float("nan"), dtype=torch.float64)
    place = {name: i for i, name in enumerate(data.concepts)}
    for row, (concept, compared) in enumerate(candidates.items()):
        if len(compared) > 1 and not any(candidate in scores.get(concept, {}) for candidate in compared):
            raise DataError(
                f"the ratings hold none for {brief(concept)}", "Make them again with `megu similarity --force`."
            )
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
        ConfigError: There are no held-out images, and the labels need some.
    """
    if problem.label_mode != "proxy":
        return _without_proxy(problem, model, matrix)
    held_out = _held_out(problem)
    asked = _proxy(problem, torch.cat([problem.request.forget, held_out]))
    said, unseen_said = asked.split([len(problem.request.forget), len(held_out)])
    there, true = _says(problem, model, held_out).double(), problem.data.train.labels[held_out]
    report = {}
    if len(held_out):
        report["held_out_acc"] = (unseen_said.argmax(1) == true).double().mean().item()
        report["original_held_out_acc"] = (there.argmax(1) == true).double().mean().item()
        if problem.labels.source == "auto" and report["held_out_acc"] < _GOOD_ENOUGH * report["original_held_out_acc"]:
            return replace(_without_proxy(problem, model, matrix), proxy=report)
    if problem.request.kind == "classes":
        target = _of_classes(problem, model, matrix, said, unseen_said, there, report)
        return Labels("proxy", target.argmax(1), target.float(), {}, report)
    if problem.request.kind == "subclasses":
        # A retrained model has not seen the kind either: the true label says no more of its answer than the proxy does.
        report["temperature"] = proxy.temperature(unseen_said, there)
        target = (said / report["temperature"]).softmax(1)
    else:
        linked = proxy.mapping(unseen_said, there, true)
        report |= {"scale": linked.scale, "bonus": linked.bonus}
        target = linked(said, problem.true)
    target = target.index_fill(1, torch.tensor(problem.request.classes, dtype=torch.int64), 0)
    target = target / target.sum(1, keepdim=True).clamp_min(1e-300)
    stays = target.gather(1, problem.true[:, None])[:, 0]
    keep = {problem.data.concepts[c]: float(stays[problem.concepts == c].mean()) for c in problem.request.asked}
    return Labels("proxy", target.argmax(1), target.float(), keep, report)


def _of_classes(
    problem: Problem,
    model: nn.Module,
    matrix: Tensor,
    said: Tensor,
    unseen_said: Tensor,
    there: Tensor,
    report: dict[str, float],
) -> Tensor:
    """(N_f, K) distributions over retained classes: softmax((log q + r log T[y] + a log p) / t).

    q is the proxy's answer, T the transition matrix, p the original's answer; t makes the proxy as sure of held-out
    images as the original is. It adds t and r to ``report``.
    """
    settings = problem.labels.proxy
    gone = torch.tensor(problem.request.classes, dtype=torch.int64)
    masked = [x.index_fill(1, gone, float("-inf")) for x in (unseen_said, there)]
    report["temperature"] = proxy.temperature(*masked)
    ratings = 0.0 if settings.ratings == "auto" else settings.ratings
    if settings.ratings == "auto" and "held_out_acc" in report:
        short = 1 - report["held_out_acc"] / max(report["original_held_out_acc"], 1e-12)
        ratings = min(_MOST_RATINGS, max(0.0, _RATINGS_BY_SHORTFALL * short))
    report["ratings"] = ratings
    rows = _rows(problem, matrix)
    predicted = _says(problem, model, problem.request.forget).double().index_fill(1, gone, float("-inf"))
    scores = said + ratings * rows.clamp_min(1e-300).log()
    scores = scores + settings.prediction * predicted.log_softmax(1).clamp_min(_LEAST)
    return (scores / report["temperature"]).masked_fill(rows == 0, float("-inf")).softmax(1)


def _held_out(problem: Problem) -> Tensor:
    """(V,) positions of the held-out images on which the proxy and the original model are compared.

    Their kinds are known to both: held-out images of a forgotten concept, and images forgotten earlier, are left out.

    Raises:
        ConfigError: There are none, and the request's classes stay: nothing tells how sure a retrained model would be.
    """
    request = problem.request
    held_out = request.held_out(problem.data)
    gone = torch.isin(problem.data.train.concepts[held_out], torch.tensor(request.concepts, dtype=torch.int64))
    held_out = held_out[~gone & ~torch.isin(held_out, request.already)]
    return held_out if request.kind == "classes" else _needed(held_out)


def _needed(held_out: Tensor) -> Tensor:
    if not len(held_out):
        raise ConfigError(
            "there are no held-out images to estimate the model's confidence on unseen data",
            "Raise data.validation, or give labels.source transition+prediction and labels.keep a number from 0 to 1.",
        )
    return held_out


def _proxy(problem: Problem, asked: Tensor) -> Tensor:
    """(N, K) log-probabilities of the proxy at positions ``asked``."""
    return proxy.answers(
        problem.data.train,
        problem.request.retain,
        asked,
        len(problem.data.classes),
        problem.labels.proxy,
        batch=problem.eval_batch,
        seed=problem.seed,
        device=problem.device,
        track=problem.track,
    )


def _without_proxy(problem: Problem, model: nn.Module, matrix: Tensor) -> Labels:
    """`perturb` from the transition matrix and the original's prediction."""
    settings, mode = problem.labels, problem.plain_label_mode
    source = "transition+prediction" if settings.source == "auto" else settings.source
    logits = _says(problem, model, problem.request.forget)
    scores = perturbing.label_scores(_rows(problem, matrix), logits.log_softmax(1), source, settings.alpha)
    draw = generator(problem.seed, "labels")
    hard = perturbing.hard_labels(scores, source, draw)
    if mode == "hard":
        return Labels(mode, hard)
    concepts, names = problem.concepts, problem.data.concepts
    keep = _keep(problem, model, mode, logits)
    told = {names[c]: float(keep[concepts == c].mean()) for c in problem.request.asked}
    target = unseen.soft_labels(scores, problem.true, keep)
    if mode == "matched":
        return Labels(mode, target.argmax(1), target.float(), told)
    if mode == "sample":
        return Labels(mode, perturbing.draw_labels(target, draw), None, told)
    return Labels(mode, hard, target.float(), told)


def _keep(problem: Problem, model: nn.Module, mode: str, logits: Tensor) -> Tensor:
    """(N_f,) how much of its true label each forgotten sample keeps; nothing where the class is wholly forgotten."""
    data, given, request = problem.data, problem.labels.keep, problem.request
    if request.kind == "classes":
        return torch.zeros(len(problem.true), dtype=torch.float64)
    rank = unseen.ranks(logits, problem.true, problem.concepts)
    if given == "auto":
        held_out = _needed(request.held_out(data))
        there, concepts = data.train.labels[held_out], data.train.concepts[held_out]
        sure = _says(problem, model, held_out).double().softmax(1).gather(1, there[:, None])[:, 0]
        if mode == "matched":
            keep = unseen.as_unseen(rank, problem.concepts, sure, concepts)
        else:
            keep = unseen.by_concept(sure, concepts, problem.concepts)
    elif mode == "matched":
        keep = (rank >= 1 - given).double()
    else:
        keep = torch.full(problem.true.shape, given, dtype=torch.float64)
    return keep.masked_fill(torch.isin(problem.true, torch.tensor(request.classes, dtype=torch.int64)), 0)


def _says(problem: Problem, model: nn.Module, index: Tensor) -> Tensor:
    """Logits of the original model on training images."""
    if not len(index):
        return torch.empty(0, len(problem.data.classes))
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


def noise_pair(problem: Problem, model: nn.Module, labels: Labels) -> dict[str, Tensor]:
    """The positive-negative feature noise pair.

    Args:
        problem: The request, ``noise`` and the batch size of ``finetune``.
        model: The original model; it is not changed.
        labels: From `perturb`.

    Returns:
        For each noise in use, ``positive`` and ``negative``, (G, R, C, H, W) float32 noises, and as ``*_class`` the
        (G,) classes that they belong to; empty where none is in use.
    """
    settings, request, use = problem.noise, problem.request, problem.noise_use(labels.mode)
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
        target, group = labels.perturbing.unique(return_inverse=True)
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
    # A proxy's labels of single images leave their class, which is nothing to be hidden.
    deep = labels.mode == "hard" or (labels.mode == "proxy" and request.kind == "classes")
    hard, source = labels.perturbing, problem.labels.source
    rows = _rows(problem, matrix)
    log_prior = torch.zeros_like(rows) if source in ("prediction", "random") else rows.log() * settings.beta
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
        reassign=settings.reassign and labels.mode == "hard" and source not in ("transition", "random"),
        weight=problem.weight(labels.mode),
        adversary=settings.adversary if deep and has_head(model, len(data.classes)) else 0.0,
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
