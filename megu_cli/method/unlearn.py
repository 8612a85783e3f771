"""The whole method on tensors: from a request, a model and similarity ratings to an unlearned model, in five steps.

The steps are `transition`, `perturb`, `noise_pair`, `align` and `calibrate`. The stages of the command line and
`megu_cli.unlearn` call them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import training
from megu_cli.errors import DataError, DivergedError, brief
from megu_cli.method import absent
from megu_cli.method.finetune import Forgotten, GroupedNoise, finetune
from megu_cli.method.labels import Labels, perturb, unseen_by_both
from megu_cli.method.noise import train_noise
from megu_cli.method.problem import UnlearningProblem
from megu_cli.method.transition import matrix_of
from megu_cli.models.features import has_head
from megu_cli.training import History

__all__ = ["Alignment", "Labels", "UnlearningProblem", "align", "calibrate", "noise_pair", "perturb", "transition"]


# Accuracy on held-out retained images that the finetuning may cost.
_DAMAGE = 0.05


@dataclass(frozen=True)
class Alignment:
    """What `align` did.

    Attributes:
        history: Of the finetuning that made the model.
        lr: Its learning rate at the start.
        lowered: Higher rates that were tried before, each with the accuracy on held-out retained images that it left;
            ``None``: its loss was no longer finite.
    """

    history: History
    lr: float
    lowered: list[tuple[float, float | None]]


def transition(
    problem: UnlearningProblem, candidates: Mapping[str, Sequence[str]], scores: Mapping[str, Mapping[str, float]]
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
    return matrix_of(problem, ratings)


def noise_pair(problem: UnlearningProblem, model: nn.Module, labels: Labels) -> dict[str, Tensor]:
    """The positive-negative feature noise pair.

    Args:
        problem: The request, ``noise``, and the batch size and its slices of ``finetune``.
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
            settings,
            away=away,
            batch=problem.finetune.batch,
            label=label,
            accumulate=problem.finetune.accumulate,
            execution=problem.execution,
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


def align(
    problem: UnlearningProblem, model: nn.Module, matrix: Tensor, labels: Labels, pair: Mapping[str, Tensor]
) -> Alignment:
    """Fragment-Align: finetune ``model`` in place; it starts as the original model and ends unlearned, in eval mode.

    Where the learning rate is ``auto``, a model that has lost accuracy on held-out retained images is finetuned once
    more from the start, at a lower rate.

    Args:
        problem: The request, ``finetune`` and ``noise.strength``.
        model: The model.
        matrix: From `transition`.
        labels: From `perturb`.
        pair: From `noise_pair`.

    Raises:
        DivergedError: The loss is no longer finite, at the lowest rate.
    """
    settings, data, request = problem.finetune, problem.data, problem.request
    # The labels that a proxy gives single images leave their class, and a class that stays need not be hidden.
    deep = labels.mode == "hard" or (labels.mode == "proxy" and request.kind == "classes")
    hard, source = labels.perturbing, problem.labels.source
    rows = problem.rows(matrix)
    log_prior = torch.zeros_like(rows) if source in ("prediction", "random") else rows.log() * settings.beta
    log_prior = log_prior.masked_fill(rows == 0, float("-inf"))  # with beta = 0, too, no label goes there
    target = functional.one_hot(hard, len(data.classes)).float() if labels.target is None else labels.target
    grouped = {"positive": hard, "negative": problem.true}
    forgotten = Forgotten(
        index=request.forget,
        target=target,
        log_prior=log_prior,
        noises=[
            GroupedNoise(pair[name], torch.searchsorted(pair[f"{name}_class"], classes))
            for name, classes in grouped.items()
            if name in pair
        ],
    )

    def validate(net: nn.Module) -> float:
        return training.accuracy(net, data.held_out, request.validation, problem.execution)

    usable = {
        "reassign": settings.reassign and labels.mode == "hard" and source not in ("transition", "random"),
        "adversary": settings.adversary if deep and has_head(model, len(data.classes)) else 0.0,
    }
    settings = settings.model_copy(update=usable)
    validated = len(request.validation)
    rates = problem.rates if validated else problem.rates[:1]  # without held-out images no damage is seen
    several = len(rates) > 1
    start = {name: value.clone() for name, value in model.state_dict().items()} if several else {}
    least = _least(validate(model), validated) if several else 0.0
    lowered: list[tuple[float, float | None]] = []
    for rate in rates:
        last = rate == rates[-1]
        try:
            history = finetune(
                model,
                data.train,
                request.retain,
                forgotten,
                settings.model_copy(update={"lr": rate}),
                retain_samples=problem.retain_samples,
                forget_batch=problem.forget_batch,
                weight=problem.weight(labels.mode),
                uniform=problem.noise.strength == "uniform",
                without_images=request.without_images(data),
                validate=validate if validated else None,
                # A resume point holds one training: a killed repetition starts over.
                execution=replace(problem.execution, resume=None) if lowered else problem.execution,
            )
            accuracy: float | None = history.validation[-1] if validated else 1.0
        except DivergedError:
            if last:
                raise
            accuracy = None
        if last or (accuracy is not None and accuracy >= least):
            break
        lowered.append((rate, accuracy))
        model.load_state_dict(start)
    return Alignment(history, rate, lowered)


def _least(before: float, images: int) -> float:
    """The accuracy on so many images below which a model counts as damaged: 5 points, or two standard errors, lower."""
    share = (before * images + 1) / (images + 2)
    return before - max(_DAMAGE, 2 * math.sqrt(share * (1 - share) / images))


def calibrate(problem: UnlearningProblem, model: nn.Module, labels: Labels) -> bool | None:
    """Set the outputs of wholly forgotten classes, in place, to what the proxy says; see `megu_cli.method.absent`.

    Args:
        problem: The request and ``finetune.calibrate``.
        model: From `align`.
        labels: From `perturb`.

    Returns:
        Whether the model's classifier allows it; ``None`` where it is not asked for or there is no proxy's answer.
    """
    if not problem.finetune.calibrate or labels.absent is None:
        return None
    data, forget, held_out = problem.data, problem.request.forget, unseen_by_both(problem)
    of_forget, of_held_out = labels.absent.split([len(forget), len(held_out)])
    sides = [(data.train, forget, of_forget), (data.held_out, held_out, of_held_out)]
    return absent.calibrate(model, sides, problem.request.classes, len(data.classes), problem.execution)
