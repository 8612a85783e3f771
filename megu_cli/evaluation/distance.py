"""How far a model is from the oracle, the model retrained without the forget set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# The metrics whose mean difference to the oracle is avg_gap.
GAP = ("retain_train_acc", "forget_train_acc", "retain_test_acc", "mia_entropy_lr")


def js_divergence(p: Tensor, q: Tensor) -> float | None:
    """Mean Jensen-Shannon divergence of predictions, in nats: 0 for equal ones, at most ln 2.

    JS = (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2, summed over classes, mean over samples (Lin, 1991).

    Args:
        p: (N, K) probabilities.
        q: (N, K) probabilities.
    """
    return max(0.0, _js(p, q).mean().item()) if len(p) else None


def _js(p: Tensor, q: Tensor) -> Tensor:
    """(N,) Jensen-Shannon divergences in nats."""
    p, q = p.double(), q.double()
    m = (p + q) / 2

    def kl(a: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, m)).sum(1)

    return (kl(p) + kl(q)) / 2


def js_difference(p: Tensor, other: Tensor, q: Tensor) -> tuple[float, float] | None:
    """95% interval of the mean difference JS(other, q) - JS(p, q) over samples; above 0: ``p`` is nearer to ``q``.

    The normal interval of paired differences.

    Args:
        p: (N, K) probabilities.
        other: (N, K) probabilities of another model on the same samples.
        q: (N, K) probabilities that both are held against.

    Returns:
        (low, high); ``None`` with fewer than two samples.
    """
    if len(p) < 2:
        return None
    apart = _js(other, q) - _js(p, q)
    mean, half = apart.mean().item(), 1.96 * (apart.std() / math.sqrt(len(apart))).item()
    return mean - half, mean + half


def agreement(p: Tensor, q: Tensor) -> float | None:
    """Share of samples on which two (N, K) predictions have the same argmax."""
    return (p.argmax(1) == q.argmax(1)).double().mean().item() if len(p) else None


def activation_distance(p: Tensor, q: Tensor) -> float | None:
    """Mean Euclidean distance of (N, K) predictions on D_f: 0 for equal ones, at most sqrt 2; ``None`` without samples.

    Source: Golatkar et al., 2021, arXiv:2012.13431, as used by Chundawat et al., 2023, arXiv:2205.08096.
    """
    return (p.double() - q.double()).square().sum(1).sqrt().mean().item() if len(p) else None


def zrf(p: Tensor, random: Tensor) -> float | None:
    """Zero retrain forgetting: 1 - JS(p, random) / ln 2 on D_f; the oracle's value is the target.

    1 means: as ignorant as a model that was never trained. Source: Chundawat et al., 2023, arXiv:2205.08096, who do
    not divide by ln 2: their JS is in bits.

    Args:
        p: (N, K) probabilities of the model.
        random: (N, K) probabilities of a randomly initialised model in eval mode.
    """
    distance = js_divergence(p, random)
    return None if distance is None else 1 - distance / math.log(2)


def label_agreement(labels: Tensor, oracle: Tensor) -> float | None:
    """Share of D_f on which the perturbing label is what the oracle predicts; two oracles' agreement is the target.

    Args:
        labels: (N,) perturbing labels.
        oracle: (N, K) predictions of the oracle on the same samples.
    """
    return (labels == oracle.argmax(1)).double().mean().item() if len(labels) else None


def avg_gap(model: Mapping[str, float | None], oracle: Mapping[str, float | None]) -> float | None:
    """Mean absolute difference to the oracle over the metrics of `GAP`: 0 is best.

    Args:
        model: Metric name -> value.
        oracle: The same of the oracle; the result is ``None`` where either lacks one of them.
    """
    gaps = _gaps(model, oracle, GAP)
    return None if gaps is None else sum(gaps) / len(gaps)


def tow(model: Mapping[str, float | None], oracle: Mapping[str, float | None]) -> float | None:
    """Tug of war: (1 - |d forget|)(1 - |d retain|)(1 - |d test|) of accuracies against the oracle's; 1 is best.

    ``None`` where either lacks one of them.

    Source: Zhao et al., 2024, arXiv:2406.01257.
    """
    gaps = _gaps(model, oracle, ("forget_train_acc", "retain_train_acc", "retain_test_acc"))
    return None if gaps is None else math.prod(1 - gap for gap in gaps)


def noise_floor(oracles: Sequence[Mapping[str, float | None]]) -> float | None:
    """Mean `avg_gap` over all pairs of oracles that differ in seed only: below it, methods cannot be told apart.

    Args:
        oracles: The metrics of each; with fewer than three the result is ``None``.
    """
    if len(oracles) < 3:
        return None
    gaps = [gap for a, b in itertools.combinations(oracles, 2) if (gap := avg_gap(a, b)) is not None]
    return sum(gaps) / len(gaps) if gaps else None


def _gaps(
    model: Mapping[str, float | None], oracle: Mapping[str, float | None], names: Sequence[str]
) -> list[float] | None:
    """Absolute differences to the oracle; ``None`` unless all can be taken."""
    gaps = [abs(a - b) for name in names if (a := model[name]) is not None and (b := oracle[name]) is not None]
    return gaps if len(gaps) == len(names) else None
