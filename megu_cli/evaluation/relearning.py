"""How fast the forgotten comes back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.execution.runtime import Track, silent
from megu_cli.training import accuracy, fit, shuffled


def relearn_epochs(
    model: nn.Module,
    split: Split,
    forget: Tensor,
    target: float,
    *,
    limit: int = 20,
    lr: float = 0.01,
    batch: int = 64,
    seed: int = 0,
    eval_batch: int = 1000,
    device: torch.device | str = "cpu",
    track: Track = silent,
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
        seed: Of the order.
        eval_batch: Samples per forward pass where nothing is learned.
        device: Where to train.
        track: Reports progress.

    Returns:
        0 if the accuracy is there already; ``None`` if it has not returned after ``limit`` epochs.
    """
    learner = copy.deepcopy(model).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(learner.parameters(), lr, momentum=0.9)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for epoch in range(limit + 1):
        if accuracy(learner, split, forget, device, batch=eval_batch) >= target:
            return epoch
        if epoch == limit:
            break
        order = shuffled(forget, len(forget), batch, seed, "relearn", epoch)
        if len(forget) == 1:
            order = [forget.repeat(2)]  # batch norm cannot take the variance of one value

        def batches(_: int, __: int, order: list[Tensor] = order) -> Iterator[tuple[Tensor, Tensor]]:
            for positions, x in zip(order, split.batches(order, device), strict=True):
                yield x, split.labels[positions].to(device)

        fit(
            learner,
            epochs=1,
            steps=math.ceil(len(forget) / batch),
            batches=batches,
            loss=lambda net, pair: functional.cross_entropy(net(pair[0]), pair[1]),
            optimizer=optimizer,
            scheduler=constant,
            seed=seed,
            label=f"relearn {epoch + 1}",
            track=track,
        )
    return None
