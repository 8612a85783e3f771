"""DELETE: distil the original's opinion without the true class.

Paper: Zhou et al., 2025, Decoupled Distillation to Erase, arXiv:2503.23751.
Reference: https://github.com/shaaaaron/DELETE
Notes: As in the paper no retained images are used; their knowledge is held by what the original says of the forgotten
ones. Batch-norm statistics are held (the reference has a switch for it). ``retain`` > 0 adds cross-entropy on D_r.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import Task, divergence, hold_statistics, teacher


def delete(model: nn.Module, task: Task, *, epochs: int = 5, lr: float = 0.00005, retain: float = 0.0) -> None:
    """Minimise KL(original with the true logit at -inf || student) on D_f.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes over D_f.
        lr: SGD learning rate at the start.
        retain: Weight of the cross-entropy on retained images, a batch of them beside each forgotten one.
    """
    original, labels, number = teacher(model), task.labels, len(task.forget)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        # D_r may be shorter than D_f: its epochs follow one another.
        kept = (pair for again in range(task.forget_steps) for pair in task.retained("delete", epoch, again))
        for gone, slots in task.forgets(number, "delete", epoch):
            x, y = next(kept) if retain else (gone[:0], slots[:0])
            yield x, y, gone, slots

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        x, y, gone, slots = batch
        hold_statistics(net)
        with torch.no_grad():
            target = erased(original(gone), labels[slots].to(gone.device))
        value = divergence(net(gone), target)
        return value + retain * functional.cross_entropy(net(x), y) if retain else value

    task.fit(model, "delete", epochs=epochs, steps=task.forget_steps, batches=batches, loss=loss, lr=lr)


def erased(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) logits with the labels' at -inf: what is left keeps its proportions."""
    return logits.scatter(1, labels[:, None], float("-inf"))
