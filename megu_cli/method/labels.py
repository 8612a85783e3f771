"""Stage 2: instance-dependent perturbing labels (MeGU, arXiv:2602.17088), and the labels of the proxy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from megu_cli import training
from megu_cli.data import Split
from megu_cli.errors import ConfigError
from megu_cli.execution.runtime import generator
from megu_cli.method import absent, proxy, unseen
from megu_cli.method.problem import UnlearningProblem

# `labels.source: auto` takes the proxy where it is right at least half as often as the original on held-out images. The
# exponent of T: this much for each share by which it is right less often, and at most the second (docs/decisions.md).
_GOOD_ENOUGH, _RATINGS_BY_SHORTFALL, _MOST_RATINGS = 0.5, 8.0, 2.0
# A log-probability of the original below this counts as this.
_LEAST = -30.0


@dataclass(frozen=True)
class Labels:
    """Perturbing labels of D_f.

    Attributes:
        mode: How they were made; see `UnlearningProblem.label_mode`.
        perturbing: (N_f,) int64 labels; where they are soft, the best-scored ones.
        target: (N_f, K) float32 distributions, where they are soft.
        keep: Concept -> how much of the true label its images keep; empty where they are hard.
        proxy: How the proxy did on held-out images and what follows from it; empty where it was not asked.
        absent: (N_f + V, G) log-odds that the proxy gives the G forgotten classes, on D_f and then on the images
            `unseen_by_both`; see `megu_cli.method.absent`.
    """

    mode: str
    perturbing: Tensor
    target: Tensor | None = None
    keep: dict[str, float] = field(default_factory=dict)
    proxy: dict[str, float] = field(default_factory=dict)
    absent: Tensor | None = None


def perturb(problem: UnlearningProblem, model: nn.Module, matrix: Tensor) -> Labels:
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
    known = unseen_by_both(problem)
    said, unseen_said = _proxy(problem, known)
    unseen_images = problem.data.held_out
    there, true = _says(problem, model, unseen_images, known).double(), unseen_images.labels[known]
    report = {}
    if len(known):
        report["held_out_acc"] = (unseen_said.argmax(1) == true).double().mean().item()
        report["original_held_out_acc"] = (there.argmax(1) == true).double().mean().item()
        if problem.labels.source == "auto" and report["held_out_acc"] < _GOOD_ENOUGH * report["original_held_out_acc"]:
            return replace(_without_proxy(problem, model, matrix), proxy=report)
    if problem.request.kind == "classes":
        target = _of_classes(problem, model, matrix, said, unseen_said, there, report)
        # Without held-out images nothing would keep the outputs low on retained ones.
        odds = absent.log_odds(torch.cat([said, unseen_said]), problem.request.classes) if len(known) else None
        return Labels("proxy", target.argmax(1), target.float(), {}, report, None if odds is None else odds.float())
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
    problem: UnlearningProblem,
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
    rows = problem.rows(matrix)
    predicted = (
        _says(problem, model, problem.data.train, problem.request.forget).double().index_fill(1, gone, float("-inf"))
    )
    scores = said + ratings * rows.clamp_min(1e-300).log()
    scores = scores + settings.prediction * predicted.log_softmax(1).clamp_min(_LEAST)
    return (scores / report["temperature"]).masked_fill(rows == 0, float("-inf")).softmax(1)


def unseen_by_both(problem: UnlearningProblem) -> Tensor:
    """(V,) positions in the held-out split of the images on which the proxy and the original model are compared.

    Their kinds are known to both: held-out images of a forgotten concept, and images forgotten earlier, are left out.

    Raises:
        ConfigError: There are none, and the request's classes stay: nothing tells how sure a retrained model would be.
    """
    request, data = problem.request, problem.data
    held_out = request.held_out(data)
    gone = torch.isin(data.held_out.concepts, torch.tensor(request.concepts, dtype=torch.int64))
    held_out = held_out[~(gone | data.held_out_among(request.already))[held_out]]
    return held_out if request.kind == "classes" else _needed(held_out)


def _needed(held_out: Tensor) -> Tensor:
    if not len(held_out):
        raise ConfigError(
            "there are no held-out images to estimate the model's confidence on unseen data",
            "Raise data.validation, or give labels.source transition+prediction and labels.keep a number from 0 to 1.",
        )
    return held_out


def _proxy(problem: UnlearningProblem, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """(N_f, K) and (V, K) log-probabilities of the proxy on D_f and on the held-out images at ``held_out``."""
    data, request = problem.data, problem.request
    asked = data.train.view(request.forget).followed_by(data.held_out.view(held_out))
    answers = proxy.answers(
        data.train, request.retain, asked, len(data.classes), problem.labels.proxy, problem.execution
    )
    return answers[: len(request.forget)], answers[len(request.forget) :]


def _without_proxy(problem: UnlearningProblem, model: nn.Module, matrix: Tensor) -> Labels:
    """`perturb` from the transition matrix and the original's prediction."""
    settings, mode = problem.labels, problem.plain_label_mode
    source = "transition+prediction" if settings.source == "auto" else settings.source
    logits = _says(problem, model, problem.data.train, problem.request.forget)
    scores = label_scores(problem.rows(matrix), logits.log_softmax(1), source, settings.alpha)
    draw = generator(problem.execution.seed, "labels")
    hard = hard_labels(scores, source, draw)
    if mode == "hard":
        return Labels(mode, hard)
    concepts, names = problem.concepts, problem.data.concepts
    keep = _keep(problem, model, mode, logits)
    told = {names[c]: float(keep[concepts == c].mean()) for c in problem.request.asked}
    target = unseen.soft_labels(scores, problem.true, keep)
    if mode == "matched":
        return Labels(mode, target.argmax(1), target.float(), told)
    if mode == "sample":
        return Labels(mode, draw_labels(target, draw), None, told)
    return Labels(mode, hard, target.float(), told)


def _keep(problem: UnlearningProblem, model: nn.Module, mode: str, logits: Tensor) -> Tensor:
    """(N_f,) how much of its true label each forgotten sample keeps; nothing where the class is wholly forgotten."""
    data, given, request = problem.data, problem.labels.keep, problem.request
    if request.kind == "classes":
        return torch.zeros(len(problem.true), dtype=torch.float64)
    rank = unseen.ranks(logits, problem.true, problem.concepts)
    if given == "auto":
        held_out = _needed(request.held_out(data))
        there, concepts = data.held_out.labels[held_out], data.held_out.concepts[held_out]
        sure = _says(problem, model, data.held_out, held_out).double().softmax(1).gather(1, there[:, None])[:, 0]
        if mode == "matched":
            keep = unseen.as_unseen(rank, problem.concepts, sure, concepts)
        else:
            keep = unseen.by_concept(sure, concepts, problem.concepts)
    elif mode == "matched":
        keep = (rank >= 1 - given).double()
    else:
        keep = torch.full(problem.true.shape, given, dtype=torch.float64)
    return keep.masked_fill(torch.isin(problem.true, torch.tensor(request.classes, dtype=torch.int64)), 0)


def _says(problem: UnlearningProblem, model: nn.Module, split: Split, index: Tensor) -> Tensor:
    """Logits of the original model on images of a split."""
    if not len(index):
        return torch.empty(0, len(problem.data.classes))
    outputs = training.predict(
        model,
        split,
        index,
        classes=len(problem.data.classes),
        features=False,
        label="labels",
        execution=problem.execution.unshared,
    )
    return outputs.logits


def label_scores(transition: Tensor, log_probabilities: Tensor, source: str, alpha: float) -> Tensor:
    """How well each class would do as a perturbing label: T[y, k] * p(k|x) ** alpha, normalised over k.

    Args:
        transition: (N, K), each sample's row of the transition matrix; 0 marks what may not be a label.
        log_probabilities: (N, K), what the original model says of the samples.
        source: ``transition+prediction``, or one of its factors alone, or ``random`` (uniform).
        alpha: Exponent of the prediction; 0 leaves the transition alone.

    Returns:
        (N, K) float64, each row summing to 1, and 0 where ``transition`` is.
    """
    prior, prediction = transition.double().log(), log_probabilities.double()
    scores = {
        "transition+prediction": prior + alpha * prediction,
        "transition": prior,
        "prediction": prediction,
        "random": torch.zeros_like(prior),
    }[source]
    return scores.masked_fill(transition == 0, float("-inf")).softmax(1)


def hard_labels(scores: Tensor, source: str, draw: torch.Generator) -> Tensor:
    """(N,) the best-scored class, or for the ``random`` source one drawn evenly."""
    return draw_labels(scores, draw) if source == "random" else scores.argmax(1)


def draw_labels(distribution: Tensor, draw: torch.Generator) -> Tensor:
    """(N,) one label drawn from each row of (N, K)."""
    return torch.multinomial(distribution, 1, generator=draw)[:, 0]
