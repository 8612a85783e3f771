"""Lower the bias of the forgotten classes' logits: a cheat.

Paper: none.
Reference: none.
Notes: Made for whole classes; without one there is nothing to shift. A mask hides a class for certain and gives itself
away by that. This shift is as small as it can be: a chosen share of the forgotten images keeps its class. All other
logits and all features stay as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megu_cli.baselines.task import Task
from megu_cli.errors import MeguError
from megu_cli.models.features import classifier
from megu_cli.training import predict


def bias_shift(model: nn.Module, task: Task, *, share: float = 0.0) -> None:
    """Subtract from each forgotten class's bias the least that leaves it ``share`` of its forgotten images.

    Args:
        model: Changed in place.
        task: The request.
        share: Fraction of the forgotten images that keep their class, from 0 to 1.

    Raises:
        MeguError: The model's classifier has no bias to lower.
    """
    bias = getattr(classifier(model, task.classes), "bias", None)
    if not isinstance(bias, Tensor):
        raise MeguError("bias_shift: the classifier has no bias that could be lowered")
    logits = predict(
        model,
        task.split,
        task.forget,
        classes=task.classes,
        features=False,
        label="bias_shift",
        execution=task.execution.unshared,
    ).logits
    with torch.no_grad():
        for own in task.forgotten:
            images = task.labels == own
            if images.any():  # else it was forgotten by an earlier request
                keep = int(share * int(images.sum()))
                bias[own] -= least_shift(logits[images] if keep else logits, own, task.forgotten, keep)
    model.eval()


def least_shift(logits: Tensor, own: int, forgotten: list[int], keep: int) -> float:
    """The least that a class's logit is to be lowered by so that ``keep`` samples are still above every retained class.

    Args:
        logits: (N, K).
        own: The class.
        forgotten: Forgotten classes.
        keep: Number of samples.
    """
    retained = logits.clone()
    retained[:, forgotten] = float("-inf")
    margins = (logits[:, own] - retained.max(1).values).sort(descending=True).values
    # A little more than the margin: the logits of another batch size differ by rounding.
    return max(0.0, float(margins[keep]) + 1e-3) if keep < len(margins) else 0.0
