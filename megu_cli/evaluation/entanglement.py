"""How far the features of classes are entangled, and how far unlearning moved them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def centroid_cosine(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Cosine of the angle between the mean features of every two classes: 1 in the same direction.

    Described before and after unlearning; it has no target but the oracle's.

    Args:
        features: (N, D) penultimate features.
        labels: (N,) true labels.
        classes: Number of classes K.

    Returns:
        (K, K) float64, symmetric; NaN for a class without samples.
    """
    x = features.double()
    sums = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x)
    counts = torch.bincount(labels, minlength=classes)
    # Without samples the mean is 0/0: NaN, and it stays so.
    directions = functional.normalize(sums / counts[:, None], dim=1)
    return directions @ directions.T


def mean_cosine(cosines: Tensor, rows: list[int], columns: list[int]) -> float | None:
    """Mean of the cosines between two groups of classes; ``None`` where there is none.

    Args:
        cosines: (K, K) from `centroid_cosine`.
        rows: Classes of one group, such as the forgotten ones.
        columns: Classes of the other, such as the retained ones.
    """
    block = cosines[rows][:, columns]
    block = block[~block.isnan()]
    return block.mean().item() if block.numel() else None


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
