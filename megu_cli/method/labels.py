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


def ranked_labels(scores: Tensor, true: Tensor, logits: Tensor, concepts: Tensor, keep: Tensor) -> Tensor:
    """(N,) labels for single images of retained classes: the least sure of each concept move, the rest stay.

    A model that never saw the images would still classify most of them correctly; those that it would not are mostly
    those with the smallest margin, even for a model that has memorised them all. So a share of 1 - keep, the
    smallest margins, takes its best-scored label, and the others keep their own.

    Args:
        scores: (N, K) from `label_scores`.
        true: (N,) true labels.
        logits: (N, K) of the original model.
        concepts: (N,) concepts, within which images are ranked.
        keep: (N,) share from 0 to 1 that keeps its label; equal within a concept.
    """
    own = logits.double().gather(1, true[:, None])
    rest = logits.double().scatter(1, true[:, None], float("-inf"))
    margin = own[:, 0] - rest.max(1).values
    labels = true.clone()
    for concept in concepts.unique():
        same = torch.where(concepts == concept)[0]
        number = round(float(1 - keep[same[0]]) * len(same))
        moved = same[margin[same].argsort(stable=True)[:number]]
        labels[moved] = scores[moved].argmax(1)
    return labels


def draw_labels(distribution: Tensor, draw: torch.Generator) -> Tensor:
    """(N,) one label drawn from each row of (N, K)."""
    return torch.multinomial(distribution, 1, generator=draw)[:, 0]


def by_concept(values: Tensor, concepts: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the held-out images of each sample's concept: what the model makes of images that it never saw.

    Args:
        values: (V,) of the held-out images, such as the true label's probability, or whether it is predicted.
        concepts: (V,) their concepts.
        wanted: (N,) concepts of the forgotten samples.

    Returns:
        (N,) float64; the mean over all held-out images where the concept has none.
    """
    values = values.double()
    result = torch.full(wanted.shape, float(values.mean()), dtype=torch.float64)
    for concept in wanted.unique():
        same = concepts == concept
        if same.any():
            result[wanted == concept] = values[same].mean()
    return result
