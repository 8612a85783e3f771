"""How far the features of classes are entangled, and how far unlearning moved them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def class_sums(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(K, D) float64: sum of the features of each class; sums of parts of the data add up.

    Args:
        features: (N, D) penultimate features.
        labels: (N,) true labels.
        classes: Number of classes K.
    """
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    return sums.index_add_(0, labels, features.double())


def mean_cosine(sums: Tensor, rows: list[int], columns: list[int]) -> float | None:
    """Mean cosine of the angles between mean features of two groups of classes: 1 in the same direction.

    Described before and after unlearning; it has no target but the oracle's. The mean over all pairs of unit vectors
    is the product of the groups' mean vectors, so that many classes cost no more than few.

    Args:
        sums: (K, D) from `class_sums`: the mean has the same direction.
        rows: Classes of one group, such as the forgotten ones; those without samples do not count.
        columns: Classes of the other, such as the retained ones.

    Returns:
        From -1 to 1; ``None`` where a group has no samples.
    """
    means = []
    for group in (rows, columns):
        some = sums[group]
        some = some[some.any(1)]
        if not len(some):
            return None
        means.append(functional.normalize(some, dim=1).mean(0))
    return float(means[0] @ means[1])


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of two representations of the same samples: 1 if equal up to rotation and scale.

    CKA = ||Y'X||^2 / (||X'X|| ||Y'Y||) in Frobenius norms, columns centred. Source: Kornblith et al., 2019,
    arXiv:1905.00414.

    Args:
        x: (N, D) features of one model.
        y: (N, E) features of another on the same samples.

    Returns:
        From 0 to 1; ``None`` where a representation is constant.
    """
    if not len(x):
        return None
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / norms).item() if norms > 0 else None
