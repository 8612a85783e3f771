"""Accuracies over samples."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float | None:
    """Share of samples whose predicted class, that of the largest logit, is the label; ``None`` without samples.

    Args:
        predicted: (N,) classes.
        labels: (N,).
    """
    return (predicted == labels).double().mean().item() if len(labels) else None


def per_class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Accuracy over the samples of each class; ``None`` for a class without samples.

    Args:
        predicted: (N,) classes.
        labels: (N,).
        classes: Number of classes K.
    """
    hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
    counts = torch.bincount(labels, minlength=classes)
    return [h / n if n else None for h, n in zip(hits.tolist(), counts.tolist(), strict=True)]
