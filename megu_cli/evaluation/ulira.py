"""U-LiRA: can an attack tell, image by image, whether a model unlearned the image or never saw it?

With several seeds each forgotten image has as many confidences from unlearned models as from oracles. Source: Hayes et
al., 2024, "Inexact unlearning needs more careful evaluations to avoid a false sense of privacy", arXiv:2403.01218.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Below it, the Gaussians of a side rest on too few seeds.
LEAST_SEEDS = 8
# No model is surer or less sure than this: a loss of 0 or infinity, such as the mask's, has no finite logit.
_LOSSES = (1e-6, 50.0)
# Random halves of the oracles, and random swaps of the sides.
_DRAWS = 200

Scaled = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Attack:
    """What U-LiRA finds; 0.5 in accuracy and AUC is a coin's toss.

    Attributes:
        accuracy: Share of (image, seed) pairs of both sides that the likelihood ratio assigns rightly.
        auc: Area under its ROC curve.
        tpr_at_1fpr: Share of unlearned pairs found at 1% false alarms.
        tpr_at_01fpr: The same at 0.1%.
        accuracy_interval: 95% interval, by a jackknife over seeds; ``None`` for the control.
        auc_interval: The same.
        auc_chance: Range of 95% of the AUCs where each seed's sides are swapped at random: an AUC within it is no
            evidence of a difference. It is wide where models differ much from seed to seed, or the sides do.
        most_told_apart: Up to ten positions of images, the one that is told apart best first.
    """

    accuracy: float
    auc: float
    tpr_at_1fpr: float
    tpr_at_01fpr: float
    accuracy_interval: tuple[float, float] | None
    auc_interval: tuple[float, float] | None
    auc_chance: tuple[float, float]
    most_told_apart: list[int]


def scaled(loss: Array) -> Array:
    """Scaled confidence log(p / (1 - p)) of the true class from its cross-entropy -log(p), of the same shape.

    Over seeds it is about Gaussian, which the probability itself is not.
    """
    result: Array = -np.log(np.expm1(np.clip(np.asarray(loss, dtype=np.float64), *_LOSSES)))
    return result


def likelihood_ratios(unlearned: Array, oracle: Array) -> tuple[Array, Array]:
    """Log likelihood ratios "unlearned" against "never seen" of every image and seed, the seed itself left out.

    Each side of an image is a Gaussian over the other seeds. With so few of them a variance of each image's own would
    be noise: as in LiRA with few models, all images of a side share one.

    Args:
        unlearned: (S, N) scaled confidences of unlearned models, from `scaled`.
        oracle: (S, N) those of the oracles of the same seeds.

    Returns:
        (S, N) ratios of the unlearned models' confidences, and (S, N) of the oracles'.

    Raises:
        ValueError: The shapes differ, or there are fewer than three seeds.
    """
    if unlearned.shape != oracle.shape or unlearned.ndim != 2:
        raise ValueError(f"both sides need the same (S, N) shape, not {unlearned.shape} and {oracle.shape}")
    seeds = len(unlearned)
    if seeds < 3:
        raise ValueError(f"a Gaussian without the seed itself needs three seeds, not {seeds}")
    of_unlearned, of_oracle = np.empty_like(unlearned), np.empty_like(oracle)
    for seed in range(seeds):
        others = np.arange(seeds) != seed
        sides = [(side[others].mean(0), _deviation(side[others])) for side in (unlearned, oracle)]
        for values, target in ((unlearned[seed], of_unlearned), (oracle[seed], of_oracle)):
            (mean_u, spread_u), (mean_o, spread_o) = sides
            target[seed] = _log_density(values, mean_u, spread_u) - _log_density(values, mean_o, spread_o)
    return of_unlearned, of_oracle


def ulira(unlearned: Array, oracle: Array, seed: int = 0) -> Attack:
    """The attack on the forget set.

    Args:
        unlearned: (S, N) scaled confidences of unlearned models, one row per seed.
        oracle: (S, N) those of the oracles of the same seeds, which share the request.
        seed: Of the swaps.

    Raises:
        ValueError: As `likelihood_ratios`.
    """
    ours, theirs = likelihood_ratios(unlearned, oracle)
    right = ((ours > 0).mean(0) + (theirs <= 0).mean(0)) / 2
    rates = _rates(ours.ravel(), theirs.ravel())
    # Images of one model are not independent of each other, seeds are: what each seed contributes gives the interval.
    others = [np.arange(len(oracle)) != s for s in range(len(oracle))]
    without = [_rates(*(r.ravel() for r in likelihood_ratios(unlearned[rest], oracle[rest]))) for rest in others]
    draw = np.random.default_rng(seed)
    return Attack(
        **rates,
        accuracy_interval=_jackknife(rates["accuracy"], [r["accuracy"] for r in without]),
        auc_interval=_jackknife(rates["auc"], [r["auc"] for r in without]),
        auc_chance=_range([_swapped(unlearned, oracle, draw) for _ in range(_DRAWS)]),
        most_told_apart=np.argsort(-right, kind="stable")[:10].tolist(),
    )


def control(oracle: Array, seed: int = 0) -> Attack:
    """The attack on oracles against other oracles, where there is nothing to find.

    Means over random halves of the seeds; ``auc_chance`` holds 95% of the halves. A single half would be no control:
    its images share a few models, and its AUC may be far from 0.5 by chance.

    Args:
        oracle: (S, N) scaled confidences of oracles, S at least six.
        seed: Of the draws.

    Raises:
        ValueError: As `likelihood_ratios`, of half of the seeds.
    """
    draw, half = np.random.default_rng(seed), len(oracle) // 2
    rates = []
    for _ in range(_DRAWS):
        order = draw.permutation(len(oracle))
        ours, theirs = likelihood_ratios(oracle[order[:half]], oracle[order[half : 2 * half]])
        rates.append(_rates(ours.ravel(), theirs.ravel()))
    return Attack(
        **{name: float(np.mean([r[name] for r in rates])) for name in rates[0]},
        accuracy_interval=None,
        auc_interval=None,
        auc_chance=_range([r["auc"] for r in rates]),
        most_told_apart=[],
    )


def attacks(confidences: Mapping[str, Scaled], oracle: str) -> dict[str, dict[str, Any]]:
    """U-LiRA of each method with enough seeds.

    The oracle itself is the `control`: half of its seeds against the other half, where these are enough.

    Args:
        confidences: Method -> seed -> scaled confidences of the forget set; ``oracle`` is among them.
        oracle: Name of the oracle's method.

    Returns:
        Method -> fields of `Attack`, and the ``seeds`` of a side; a method with too few seeds is not there.
    """
    known, result = confidences.get(oracle, {}), {}
    for name, by_seed in confidences.items():
        seeds = [seed for seed in by_seed if seed in known]
        number = len(seeds) // 2 if name == oracle else len(seeds)
        if number >= LEAST_SEEDS:
            theirs = np.array([known[seed] for seed in seeds])
            ours = np.array([by_seed[seed] for seed in seeds])
            attack = control(theirs) if name == oracle else ulira(ours, theirs)
            result[name] = {**asdict(attack), "seeds": number}
    return result


def _swapped(unlearned: Array, oracle: Array, draw: np.random.Generator) -> float:
    """The AUC where each seed has changed sides with a probability of one half."""
    swap = draw.random((len(oracle), 1)) < 0.5
    ours, theirs = likelihood_ratios(np.where(swap, oracle, unlearned), np.where(swap, unlearned, oracle))
    return _auc(ours.ravel(), theirs.ravel())


def _rates(positive: Array, negative: Array) -> dict[str, float]:
    """The figures of `Attack` from log likelihood ratios of unlearned models and of oracles, both flat."""
    return {
        "accuracy": _accuracy(positive, negative),
        "auc": _auc(positive, negative),
        "tpr_at_1fpr": _rate(positive, negative, 0.01),
        "tpr_at_01fpr": _rate(positive, negative, 0.001),
    }


def _accuracy(positive: Array, negative: Array) -> float:
    return float(((positive > 0).mean() + (negative <= 0).mean()) / 2)


def _deviation(values: Array) -> float:
    """Standard deviation over seeds, one for all images."""
    return float(max(np.sqrt(values.var(0, ddof=1).mean()), 1e-3))


def _log_density(values: Array, mean: Array, spread: float) -> Array:
    result: Array = -0.5 * ((values - mean) / spread) ** 2 - np.log(spread)
    return result


def _auc(positive: Array, negative: Array) -> float:
    """Probability that a positive scores above a negative, ties half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    equal = np.searchsorted(ordered, positive, side="right") - below
    return float((below + 0.5 * equal).mean() / len(negative))


def _rate(positive: Array, negative: Array, alarms: float) -> float:
    """Share of the positives above the threshold that at most a share ``alarms`` of the negatives exceeds."""
    allowed = int(alarms * len(negative))
    threshold = np.sort(negative)[len(negative) - 1 - allowed]
    return float((positive > threshold).mean())


def _jackknife(value: float, without: list[float]) -> tuple[float, float]:
    """95% interval by Student's t from the values without each of S seeds, cut to 0 and 1."""
    from scipy import stats

    seeds = len(without)
    error = np.sqrt((seeds - 1) / seeds * np.square(np.array(without) - np.mean(without)).sum())
    half = float(stats.t.ppf(0.975, seeds - 1) * error)
    return max(0.0, value - half), min(1.0, value + half)


def _range(values: list[float]) -> tuple[float, float]:
    """What holds 95% of the values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
