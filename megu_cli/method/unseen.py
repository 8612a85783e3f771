"""Beyond the paper: labels of single images and sub-classes without a proxy.

The classes of single images stay, and a retrained model gets most of them right: a perturbing label for each would
forget too much. So their labels are soft, and as sure as the original model is of held-out images (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Images of a concept that can speak for it.
_ENOUGH = 10


def ranks(logits: Tensor, true: Tensor, concepts: Tensor) -> Tensor:
    """(N,) where each sample stands among those of its concept, from 0 to 1, the least sure first.

    What a model is least sure of is what a model that never saw it would get wrong: by the margin between the true
    logit and the next, also where the model has learned all of them by heart.

    Args:
        logits: (N, K) of the original model.
        true: (N,) true labels.
        concepts: (N,) concepts.
    """
    from scipy.stats import rankdata  # not when the module is imported: it takes a moment

    own = logits.double().gather(1, true[:, None])[:, 0]
    margin = own - logits.double().scatter(1, true[:, None], float("-inf")).max(1).values
    result = torch.empty(len(margin), dtype=torch.float64)
    for concept in concepts.unique():
        same = torch.where(concepts == concept)[0]
        place = torch.as_tensor(rankdata(margin[same].numpy(), "ordinal"), dtype=torch.float64)
        result[same] = (place - 0.5) / len(same)
    return result


def as_unseen(rank: Tensor, concepts: Tensor, unseen: Tensor, unseen_concepts: Tensor) -> Tensor:
    """(N,) how sure of its true label the model would be of each sample, had it not seen it.

    The samples of a concept are matched with held-out images of it, rank by rank: the least sure gets the true label's
    probability that the least sure held-out image has, and so on. So forgotten samples are as often right, and as
    surely, as images that were never seen.

    Args:
        rank: (N,) from `ranks`.
        concepts: (N,) their concepts.
        unseen: (V,) probability of the true label on held-out images.
        unseen_concepts: (V,) theirs; a concept with fewer than 10 takes all held-out images.
    """
    result = torch.empty(len(rank), dtype=torch.float64)
    for concept in concepts.unique().tolist():
        same = concepts == concept
        there = unseen_concepts == concept
        values = unseen[there] if there.sum() >= _ENOUGH else unseen
        result[same] = torch.quantile(values.double(), rank[same].clamp(0, 1))
    return result


def by_concept(values: Tensor, concepts: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the held-out images of each sample's concept: what the model makes of images that it never saw.

    Args:
        values: (V,) of the held-out images, such as the true label's probability.
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
