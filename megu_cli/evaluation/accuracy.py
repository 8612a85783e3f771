"""Accuracies over samples."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """Share of samples whose largest logit is the label's; ``None`` without samples.

    Args:
        logits: (N, K).
        labels: (N,).
    """
    return (logits.argmax(1) == labels).double().mean().item() if len(labels) else None


def per_class_accuracy(logits: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Accuracy over the samples of each class; ``None`` for a class without samples.

    Args:
        logits: (N, K).
        labels: (N,).
        classes: Number of classes K.
    """
    hits = torch.bincount(labels[logits.argmax(1) == labels], minlength=classes).double()
    counts = torch.bincount(labels, minlength=classes)
    return [h / n if n else None for h, n in zip(hits.tolist(), counts.tolist(), strict=True)]
