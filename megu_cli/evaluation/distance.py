"""How far a model is from the oracle, the model retrained without the forget set."""

from __future__ import annotations

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
    if not len(p):
        return None
    p, q = p.double(), q.double()
    m = (p + q) / 2

    def kl(a: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, m)).sum(1)

    return max(0.0, ((kl(p) + kl(q)) / 2).mean().item())


def agreement(p: Tensor, q: Tensor) -> float | None:
    """Share of samples on which two (N, K) predictions have the same argmax."""
    return (p.argmax(1) == q.argmax(1)).double().mean().item() if len(p) else None


def avg_gap(model: dict[str, float | None], oracle: dict[str, float | None]) -> float:
    """Mean absolute difference to the oracle over the metrics of `GAP`: 0 is best.

    Args:
        model: Metric name -> value.
        oracle: The same of the oracle.
    """
    gaps = [abs(_number(model[name]) - _number(oracle[name])) for name in GAP]
    return sum(gaps) / len(gaps)


def tow(model: dict[str, float | None], oracle: dict[str, float | None]) -> float:
    """Tug of war: (1 - |d forget|)(1 - |d retain|)(1 - |d test|) of accuracies against the oracle's; 1 is best.

    Source: Zhao et al., 2024, arXiv:2406.01257.
    """
    product = 1.0
    for name in ("forget_train_acc", "retain_train_acc", "retain_test_acc"):
        product *= 1 - abs(_number(model[name]) - _number(oracle[name]))
    return product


def _number(value: float | None) -> float:
    if value is None:
        raise ValueError("a metric that the comparison needs has no value")
    return value
