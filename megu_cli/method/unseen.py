"""Beyond the paper: what a model that never saw the forgotten would say of them.

Of whole classes, a stand-in for that model tells better where they go than the original, which has learned to tell them
apart. The classes of single images stay, and a retrained model gets most of them right: a perturbing label for each
would forget too much, so their labels are soft, and as sure as the original is of held-out images. docs/decisions.md
has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.method.discriminant import Discriminant, thumbnails
from megu_cli.runtime import Track, derive, silent
from megu_cli.training import shuffled

# Images that a stand-in is made from.
KNOWN = 6000
# Images of a concept that can speak for it; a stand-in's least log-probability: where images hardly vary within a
# class, it would be of any size; trees of a forest, and images that it is asked about.
_ENOUGH, _LEAST, _TREES, _ASKED = 10, -30.0, 100, 300
# A tree has a number for every class at every node: of more classes, fewer trees, but as many that every image is
# judged by some.
_TREES_BY_CLASSES, _LEAST_TREES = 10_000, 20


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
    shown = shuffled(retain, min(len(retain), KNOWN), batch, seed, "stand-in")
    judge = Discriminant({}, "looks", torch.arange(classes), classes, 1, device)
    looks = _looks(split, [*shown, *forget.split(batch)], device, track)
    for positions, x in zip(shown, looks, strict=False):  # what is left of them are those of D_f
        judge.see(x, split.labels[positions])
    return torch.cat([judge.log_probabilities(x).clamp_min(_LEAST).cpu() for x in looks])


def _looks(split: Split, order: Sequence[Tensor], device: torch.device | str, track: Track) -> Iterator[Tensor]:
    """Thumbnails (B, C * 64) for each tensor of positions in ``order``."""
    with track("stand-in", len(order)) as advance:
        for x in split.batches(order, device):
            yield thumbnails(x)
            advance()


def ranks(opinions: Sequence[Tensor], true: Tensor, concepts: Tensor) -> Tensor:
    """(N,) where each sample stands among those of its concept, from 0 to 1, the least sure first.

    What a model is least sure of is what a model that never saw it would get wrong: by the margin between the true
    logit and the next, also where the model has learned all of them by heart. A stand-in, which never saw them, tells
    it as well, of sub-classes better (docs/decisions.md).

    Args:
        opinions: (N, K) each: logits of the original model and, where there is one, log-probabilities of a stand-in.
            The ranks by their margins count alike.
        true: (N,) true labels.
        concepts: (N,) concepts.
    """
    total = torch.zeros(len(true), dtype=torch.float64)
    for said in opinions:
        own = said.double().gather(1, true[:, None])[:, 0]
        others = said.double().scatter(1, true[:, None], float("-inf")).max(1).values
        total += _ranked(own - others, concepts, "average")
    return _ranked(total, concepts, "ordinal")


def _ranked(values: Tensor, concepts: Tensor, ties: str) -> Tensor:
    from scipy.stats import rankdata  # not when the module is imported: it takes a moment

    result = torch.empty(len(values), dtype=torch.float64)
    for concept in concepts.unique():
        same = torch.where(concepts == concept)[0]
        place = torch.as_tensor(rankdata(values[same].numpy(), ties), dtype=torch.float64)
        result[same] = (place - 0.5) / len(same)
    return result


def left_right(
    split: Split,
    retain: Tensor,
    forget: Tensor,
    *,
    batch: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> dict[int, float]:
    """Concept -> of its samples that are classified correctly, how many still are by a model without the concept.

    Held-out images of a sub-class say how the original does on images that it has not seen, of a kind that it has. A
    retrained model has seen none of the kind. How much that costs, two random forests on thumbnails tell, one made
    without the forgotten images, and one with them, which is asked of each by the trees that have not seen it.

    Args:
        split: Where the images are.
        retain: (N_r,) positions of D_r.
        forget: (N_f,) positions of D_f, wholly forgotten concepts. Of both, at most 6,000 are looked at, in proportion,
            but of D_f at least 300 where it has as many.
        batch: Images at a time.
        seed: Of the draw and the forests.
        device: Where thumbnails are made.
        track: Reports progress.

    Returns:
        A share from 0 to 1 for each concept of which at least 10 images were right.
    """
    from sklearn.ensemble import RandomForestClassifier

    known = torch.cat([retain, forget])
    shown = shuffled(known, min(len(known), KNOWN), batch, seed, "left right")
    others = forget[~torch.isin(forget, torch.cat(shown))]
    more = min(len(others), _ASKED - (len(forget) - len(others)))
    if more > 0:
        shown = [*shown, *shuffled(others, more, batch, seed, "left right", "more")]
    index = torch.cat(shown)
    looks = torch.cat([x.cpu() for x in _looks(split, shown, device, track)]).float().numpy()
    gone = torch.isin(index, forget).numpy()
    labels, concepts = split.labels[index].numpy(), split.concepts[index].numpy()
    state, jobs = derive(seed, "left right", "forest") % 2**32, torch.get_num_threads()
    trees = min(_TREES, max(_LEAST_TREES, _TREES_BY_CLASSES // len(split.labels.unique())))
    forest = RandomForestClassifier(trees, oob_score=True, random_state=state, n_jobs=jobs).fit(looks, labels)
    within = forest.classes_[forest.oob_decision_function_[gone].argmax(1)] == labels[gone]
    del forest  # of many classes it is large
    forest = RandomForestClassifier(trees, random_state=state, n_jobs=jobs).fit(looks[~gone], labels[~gone])
    without = forest.predict(looks[gone]) == labels[gone]
    result = {}
    for concept in set(concepts[gone].tolist()):
        same = concepts[gone] == concept
        if within[same].sum() >= _ENOUGH:
            result[concept] = min(1.0, float(without[same].sum() / within[same].sum()))
    return result


def as_unseen(
    rank: Tensor,
    concepts: Tensor,
    unseen: Tensor,
    unseen_concepts: Tensor,
    left: Mapping[int, float] = MappingProxyType({}),
) -> Tensor:
    """(N,) how sure of its true label the model would be of each sample, had it not seen it.

    The samples of a concept are matched with held-out images of it, rank by rank: the least sure gets the true label's
    probability that the least sure held-out image has, and so on. So forgotten samples are as often right, and as
    surely, as images that were never seen. Where the whole concept was never seen, the least sure get 0 until only the
    share ``left`` is.

    Args:
        rank: (N,) from `ranks`.
        concepts: (N,) their concepts.
        unseen: (V,) probability of the true label on held-out images.
        unseen_concepts: (V,) theirs; a concept with fewer than 10 takes all held-out images.
        left: Wholly forgotten concept -> from `left_right`; 1 where missing.
    """
    result = torch.empty(len(rank), dtype=torch.float64)
    for concept in concepts.unique().tolist():
        same = concepts == concept
        there = unseen_concepts == concept
        values = unseen[there] if there.sum() >= _ENOUGH else unseen
        lost = 1 - left.get(concept, 1.0)
        place = (rank[same] - lost) / max(1 - lost, 1e-12)
        sure = torch.quantile(values.double(), place.clamp(0, 1))
        result[same] = torch.where(rank[same] < lost, 0.0, sure)
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
