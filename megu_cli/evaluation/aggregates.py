"""What the report's figures are drawn from: counts over groups of images, and a plane of unseen images.

Nothing here can be traced to a single forgotten image: no position, no name, no pixel and no feature of one.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Loss and entropy of a trained model span many powers of ten: bins of equal width in log10, the outermost open.
LOG_LOSS = (-6.0, 1.5)
BINS = 30


def log_histogram(values: Tensor, low: float, high: float, bins: int = BINS) -> list[int]:
    """Counts of log10(values) in equal bins from ``low`` to ``high``; what lies beyond counts in the outermost bin.

    Args:
        values: (N,) non-negative; 0 and infinity fall in the first and the last bin.
        low: log10 of the lower end.
        high: log10 of the upper end.
        bins: Their number.
    """
    place = (values.double().log10() - low) / (high - low) * bins
    return torch.bincount(place.floor().clamp(0, bins - 1).long(), minlength=bins).tolist()


def histograms(loss: Tensor, entropy: Tensor, classes: int) -> dict[str, Any]:
    """Histograms of a model's cross-entropy loss and of its output entropy on a group of images, both in nats.

    Args:
        loss: (N,) cross-entropies.
        entropy: (N,) entropies of the outputs.
        classes: Number of classes K.

    Returns:
        ``loss`` and ``entropy``, each with ``low`` and ``high`` (log10 nats) and ``counts``.
    """
    # No entropy is above ln K.
    ends = {"loss": LOG_LOSS, "entropy": (LOG_LOSS[0], math.log10(math.log(classes)))}
    values = {"loss": loss, "entropy": entropy.clamp_min(0)}
    return {
        name: {"low": low, "high": high, "counts": log_histogram(values[name], low, high)}
        for name, (low, high) in ends.items()
    }


def flow(true: Tensor, perturbing: Tensor | None, predicted: Tensor) -> list[list[int | None]]:
    """How many images go from each label over each perturbing label to each new prediction, most first.

    Args:
        true: (N,) labels.
        perturbing: (N,) perturbing labels; none where they are not at hand.
        predicted: (N,) the unlearned model's predictions.

    Returns:
        Rows (label, perturbing label or ``None``, prediction, number of images).
    """
    middle = [None] * len(true) if perturbing is None else perturbing.tolist()
    counts = Counter(zip(true.tolist(), middle, predicted.tolist(), strict=True))
    return [[*path, n] for path, n in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))]


def plane(features: Tensor, labels: Tensor, onto: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """The plane in which the class means lie furthest apart: principal components of the means.

    Args:
        features: (N, D) penultimate features.
        labels: (N,) classes.
        onto: (N, 2) the same images in another model's plane; the result is turned and mirrored to lie as near to it
            as it can (orthogonal Procrustes), so that two planes can be compared by eye.

    Returns:
        (N, 2) float64, centred, with a root mean square of 1.
    """
    x = features.double().numpy()
    x = x - x.mean(0)
    means = np.stack([x[labels.numpy() == c].mean(0) for c in labels.unique().tolist()])
    _, _, axes = np.linalg.svd(means - means.mean(0), full_matrices=False)
    axes = np.vstack([axes, np.zeros((2, x.shape[1]))])[:2]  # with one or two classes there are fewer axes
    # The sign of an axis is free: fix it, so that the same features give the same plane.
    axes = axes * np.where(axes[np.arange(2), np.abs(axes).argmax(1)] < 0, -1, 1)[:, None]
    flat = x @ axes.T
    flat = flat / max(float(np.sqrt((flat**2).sum(1).mean())), 1e-12)
    if onto is not None:
        u, _, v = np.linalg.svd(flat.T @ onto)
        flat = flat @ (u @ v)
    return np.asarray(flat)
