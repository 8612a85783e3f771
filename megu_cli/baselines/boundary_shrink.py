"""Boundary Shrink: give each forgotten image the label on the other side of its nearest boundary.

Paper: Chen et al., 2023, Boundary Unlearning, arXiv:2303.11570.
Reference: https://github.com/TY-LEE-KR/Boundary-Unlearning-Code
Notes: The boundary is crossed by one step along the sign of the gradient (FGSM), in normalised space, from the frozen
original; where that reaches no other class, the runner-up there is taken, since the own label would unlearn nothing.
Batch-norm statistics are held: D_f alone would become the norm. No retained images, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import Task, hold_statistics, teacher


def boundary_shrink(model: nn.Module, task: Task, *, epochs: int = 5, lr: float = 0.0001, bound: float = 0.1) -> None:
    """Train on D_f with the nearest wrong labels.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes over D_f.
        lr: SGD learning rate at the start.
        bound: Length of the step per pixel, in normalised units.
    """
    original, labels, number = teacher(model), task.labels, len(task.forget)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, slots = batch
        hold_statistics(net)
        true = labels[slots].to(x.device)
        return functional.cross_entropy(net(x), nearest_label(original, x, true, bound))

    task.fit(
        model,
        "boundary_shrink",
        epochs=epochs,
        steps=task.forget_steps,
        batches=lambda epoch: task.forgets(number, "boundary_shrink", epoch),
        loss=loss,
        lr=lr,
    )


def nearest_label(original: nn.Module, x: Tensor, labels: Tensor, bound: float) -> Tensor:
    """(B,) class other than the true one that x + bound * sign(gradient of the loss) is likeliest of.

    Args:
        original: The frozen model.
        x: (B, C, H, W) images.
        labels: (B,) true labels.
        bound: Length of the step.
    """
    with torch.enable_grad():
        moved = x.detach().requires_grad_()
        gradient = torch.autograd.grad(functional.cross_entropy(original(moved), labels, reduction="sum"), moved)[0]
    with torch.no_grad():
        logits: Tensor = original(x + bound * gradient.sign())
    return logits.scatter(1, labels[:, None], float("-inf")).argmax(1)
