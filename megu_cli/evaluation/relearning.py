"""How fast the forgotten comes back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.training import Duration, accuracy, fit, shuffled


def relearn_epochs(
    model: nn.Module,
    split: Split,
    forget: Tensor,
    target: float,
    *,
    limit: int = 20,
    lr: float = 0.01,
    batch: int = 64,
    execution: Execution = LOCAL,
) -> int | None:
    """Epochs of training on D_f alone until the original's accuracy on it returns; the oracle's number is the target.

    Fewer than the oracle needs: something was left. The training runs on a copy. Source: Golatkar et al., 2020,
    arXiv:1911.04933 (relearn time).

    Args:
        model: The model; it is not changed.
        split: Where the images are.
        forget: (N_f,) positions of D_f.
        target: Accuracy of the original model on D_f, from 0 to 1.
        limit: Epochs at most.
        lr: SGD learning rate, with momentum 0.9.
        batch: Samples per step.
        execution: Device, seed of the order, progress. The work is neither shared between processes nor resumed.

    Returns:
        0 if the accuracy is there already; ``None`` if it has not returned after ``limit`` epochs.
    """
    execution = execution.unshared
    learner = copy.deepcopy(model).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(learner.parameters(), lr, momentum=0.9)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for epoch in range(limit + 1):
        if accuracy(learner, split, forget, execution) >= target:
            return epoch
        if epoch == limit:
            break
        order = shuffled(forget, len(forget), batch, execution.seed, "relearn", epoch)
        if len(forget) == 1:
            order = [forget.repeat(2)]  # batch norm cannot take the variance of one value

        def batches(_: int, __: int, order: list[Tensor] = order) -> Iterator[tuple[Tensor, Tensor]]:
            for positions, x in zip(order, split.batches(order, execution.device), strict=True):
                yield x, split.labels[positions].to(execution.device)

        fit(
            learner,
            Duration(1, math.ceil(len(forget) / batch)),
            batches=batches,
            loss=lambda net, pair: functional.cross_entropy(net(pair[0]), pair[1]),
            optimizer=optimizer,
            scheduler=constant,
            label=f"relearn {epoch + 1}",
            execution=execution,
        )
    return None
