"""Beyond the paper: what a model that never saw the forgotten would say of them.

Of whole classes, a stand-in for that model tells better where they go than the original, which has learned to tell them
apart. The classes of single images stay, and a retrained model gets most of them right: a perturbing label for each
would forget too much, so their labels are soft, and as sure as the original is of held-out images. docs/decisions.md
has the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.method.discriminant import Discriminant, thumbnails
from megu_cli.runtime import Track, silent
from megu_cli.training import shuffled

# Held-out images of a concept that can speak for it; retained images that a stand-in is made from; its least
# log-probability: where images hardly vary within a class, it would be of any size.
_ENOUGH, _RETAINED, _LEAST = 10, 6000, -30.0


def stand_in(
    split: Split,
    retain: Tensor,
    forget: Tensor,
    classes: int,
    *,
    batch: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> Tensor:
    """(N_f, K) float64: log-probabilities from -30 up, by a linear discriminant on thumbnails of retained images.

    Crude, but it never saw what is forgotten, and takes a second: a retrained model mistakes the forgotten for what
    looks like them.

    Args:
        split: Where the images are.
        retain: (N_r,) positions of D_r, of which at most 6,000 are looked at.
        forget: (N_f,) positions of D_f.
        classes: Number of classes K.
        batch: Images at a time.
        seed: Of the draw.
        device: Where to compute.
        track: Reports progress.
    """
    known = shuffled(retain, min(len(retain), _RETAINED), batch, seed, "stand-in")
    asked = list(forget.split(batch))
    judge = Discriminant({}, "looks", retain, classes, 1, device)
    said = []
    with track("stand-in", len(known) + len(asked)) as advance:
        for place, x in enumerate(split.batches([*known, *asked], device)):
            if place < len(known):
                judge.see(thumbnails(x), split.labels[known[place]])
            else:
                said.append(judge.log_probabilities(thumbnails(x)).clamp_min(_LEAST).cpu())
            advance()
    return torch.cat(said)


def ranks(logits: Tensor, true: Tensor, concepts: Tensor) -> Tensor:
    """(N,) where each sample stands among those of its concept, from 0 to 1, the least sure first.

    What a model is least sure of is what a model that never saw it would get wrong: by the margin between the true
    logit and the next, also where the model has learned all of them by heart.

    Args:
        logits: (N, K) of the original model.
        true: (N,) true labels.
        concepts: (N,) concepts.
    """
    own = logits.double().gather(1, true[:, None])[:, 0]
    margin = own - logits.double().scatter(1, true[:, None], float("-inf")).max(1).values
    result = torch.empty(len(margin), dtype=torch.float64)
    for concept in concepts.unique():
        same = torch.where(concepts == concept)[0]
        order = margin[same].argsort(stable=True)
        result[same[order]] = (torch.arange(len(same), dtype=torch.float64) + 0.5) / len(same)
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
    for concept in concepts.unique():
        same = concepts == concept
        there = unseen_concepts == concept
        values = unseen[there] if there.sum() >= _ENOUGH else unseen
        result[same] = torch.quantile(values.double(), rank[same])
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
