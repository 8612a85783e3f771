"""SSD: dampen the weights that matter more to the forget set than to the whole training set.

Paper: Foster et al., 2024, Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening,
arXiv:2308.07707.
Reference: https://github.com/if-loops/selective-synaptic-dampening
Notes: As in the reference, the importance is the mean over batches of the squared gradient of the batch's mean loss,
and D is all of the training images, the forgotten ones included. So that the two importances compare, both use batches
of the same size. No training. A batch of one class has aligned gradients and a mixed one has not, so the threshold
depends on the share of D_f and on the batch size, and is the first thing to tune: 50 here, 10 in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megu_cli.baselines.task import Task, summed
from megu_cli.execution.runtime import generator
from megu_cli.models.features import frozen


def ssd(model: nn.Module, task: Task, *, alpha: float = 50.0, lam: float = 1.0) -> None:
    """Multiply each selected weight by its `dampening`.

    Args:
        model: Changed in place.
        task: The request.
        alpha: A weight is selected if I_f > alpha I_D; smaller selects more.
        lam: lambda; smaller dampens more.
    """
    whole = importance(model, task, torch.cat([task.retain, task.forget]), "whole")
    forgotten = importance(model, task, task.forget, "forget")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.mul_(dampening(whole[key], forgotten[key], alpha, lam))
    model.eval()


def importance(model: nn.Module, task: Task, index: Tensor, label: str) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information of each parameter over ``index``, with the true labels."""
    order = index[torch.randperm(len(index), generator=generator(task.seed, "ssd", label))]
    number = math.ceil(len(order) / task.batch)
    with frozen(model), task.track(f"ssd {label}", number) as advance:
        model.requires_grad_(True)

        def squares() -> Iterator[dict[str, Tensor]]:
            for gradient in task.gradients(model, order):
                yield {key: value.square() / number for key, value in gradient.items()}
                advance()

        return summed(squares())


def dampening(whole: Tensor, forgotten: Tensor, alpha: float, lam: float) -> Tensor:
    """min(lam I_D / I_f, 1) where I_f > alpha I_D, else 1 (eq. 4 and 5 of the paper).

    Args:
        whole: I_D, importances over the training set.
        forgotten: I_f, importances over the forget set.
        alpha: Selection threshold.
        lam: Dampening constant.
    """
    selected = forgotten > alpha * whole
    # Where nothing is selected the quotient may be 0/0, and is not used.
    return torch.where(selected, (lam * whole / forgotten).clamp_max(1), torch.ones_like(whole))
