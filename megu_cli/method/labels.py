"""Stage 2: instance-dependent perturbing labels (MeGU, arXiv:2602.17088)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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


def soft_labels(scores: Tensor, true: Tensor, keep: Tensor) -> Tensor:
    """(N, K) distributions that keep mass on the true label; what is left follows the scores of the others.

    Args:
        scores: (N, K) from `label_scores`.
        true: (N,) true labels.
        keep: (N,) mass from 0 to 1 that stays on the true label.
    """
    identity = functional.one_hot(true, scores.shape[1]).to(scores)
    others = scores * (1 - identity)
    others = others / others.sum(1, keepdim=True).clamp_min(1e-300)
    return keep.to(scores)[:, None] * identity + (1 - keep.to(scores))[:, None] * others


def draw_labels(distribution: Tensor, draw: torch.Generator) -> Tensor:
    """(N,) one label drawn from each row of (N, K)."""
    return torch.multinomial(distribution, 1, generator=draw)[:, 0]


def unseen_confidence(probabilities: Tensor, true: Tensor, concepts: Tensor, wanted: Tensor) -> Tensor:
    """How sure the model is of held-out images of each sample's concept: what a model that never saw them would be.

    Args:
        probabilities: (V, K) of the held-out images.
        true: (V,) their true labels.
        concepts: (V,) their concepts.
        wanted: (N,) concepts of the forgotten samples.

    Returns:
        (N,) mean probability of the true label over the held-out images of the same concept; over all of them where
        the concept has none.
    """
    sure = probabilities.double().gather(1, true[:, None])[:, 0]
    result = torch.full(wanted.shape, float(sure.mean()), dtype=torch.float64)
    for concept in wanted.unique():
        same = concepts == concept
        if same.any():
            result[wanted == concept] = sure[same].mean()
    return result
