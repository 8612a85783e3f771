"""Stage 2: instance-dependent perturbing labels (MeGU, arXiv:2602.17088)."""

from __future__ import annotations

import torch
from torch import Tensor


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
