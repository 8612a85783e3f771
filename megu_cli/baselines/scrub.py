"""SCRUB: move away from the teacher on what is forgotten, stay with it on what is retained.

Paper: Kurmanji et al., 2023, Towards Unbounded Machine Unlearning, arXiv:2302.09880.
Reference: https://github.com/meghdadk/SCRUB
Notes: The first ``max_epochs`` epochs begin with a pass over D_f that maximises the divergence; every epoch goes on
with a pass over D_r that minimises the other two terms. The teacher is in eval mode. Without the rewinding of SCRUB+R,
which serves privacy rather than forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import Task, divergence, teacher


def scrub(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 3,
    max_epochs: int = 2,
    lr: float = 0.001,
    alpha: float = 0.1,
    gamma: float = 0.99,
    temperature: float = 4.0,
    forget_batch: int = 64,
) -> None:
    """Alternate max passes over D_f and min passes over D_r.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Min passes.
        max_epochs: Epochs that begin with a max pass, at most ``epochs``.
        lr: SGD learning rate at the start.
        alpha: Weight of the divergence on D_r.
        gamma: Weight of the cross-entropy on D_r.
        temperature: Of the divergence.
        forget_batch: Forgotten samples per step of a max pass, the reference's size. What the other methods take would
            be so many small steps of ascent that they destroy the model.
    """
    original = teacher(model)
    up = min(max_epochs, epochs) * math.ceil(len(task.forget) / forget_batch)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        if epoch < max_epochs:
            for gone, _ in task.forgets(len(task.forget), "scrub", epoch, batch=forget_batch):
                yield gone, None
        yield from task.retained("scrub", epoch)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        x, labels = batch
        with torch.no_grad():
            says = original(x)
        return scrub_loss(net(x), says, labels, alpha, gamma, temperature)

    task.fit(model, "scrub", epochs=epochs, steps=task.steps + up / epochs, batches=batches, loss=loss, lr=lr)


def scrub_loss(
    student: Tensor, original: Tensor, labels: Tensor | None, alpha: float, gamma: float, temperature: float
) -> Tensor:
    """-KL on forgotten samples; alpha KL + gamma CE on retained ones (eq. 3 of the paper).

    Args:
        student: (B, K) logits.
        original: (B, K) logits of the teacher.
        labels: (B,) of retained samples; ``None`` for forgotten ones.
        alpha: Weight of the divergence.
        gamma: Weight of the cross-entropy.
        temperature: Of the divergence.
    """
    distance = divergence(student, original, temperature)
    if labels is None:
        return -distance
    return alpha * distance + gamma * functional.cross_entropy(student, labels)
