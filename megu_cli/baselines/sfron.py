"""SFRon: ascend on the forgotten images in the weights that matter to them, and descend on the retained ones between.

Paper: Huang et al., 2024, Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement,
arXiv:2409.19732.
Reference: https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry, Classification/unlearn/sfron.py
Notes: The order of the steps, the optimizer and the settings are those of the reference for 10% of CIFAR-10, but for
the length, there 1,500 steps. The reference has no example of whole classes: its weight of the ascent, 25, is 1 for
them here, since it drives losses far above a retrained model's. The moving average of weights is left out: its rate
there, 1, keeps the current weights. The learning rate falls at every step of both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.ssd import importance
from megu_cli.baselines.task import Task

# Where both importances of a weight are 0 their quotient is 1.
_TINY = 1e-15
# Samples of a training step get a weight of 1 / loss^_FOCUS in the ascent: those that are known best count most.
_FOCUS = 0.5


def sfron(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 5,
    lr: float = 0.01,
    alpha: float = 0.0,
    every: int = 5,
    gamma: float = 1.0,
    clip: float = 7.0,
) -> None:
    """Take a step of ascent on D_f before every fifth step of descent on D_r.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes over retained samples.
        lr: SGD learning rate at the start.
        alpha: Weight of the ascent at the start, from which it falls to 0 as a cosine; 0 means 1 for whole
            classes, else 25.
        every: Steps on D_r for each step on D_f.
        gamma: The ascent moves weights whose importance to D_f is at least gamma times that to D_r.
        clip: Largest norm of the ascent's gradient.
    """
    alpha = alpha or (1.0 if task.of_classes else 25.0)
    lost, kept = importance(model, task, task.forget, "forget"), importance(model, task, task.retain, "retain")
    masks = {key: (lost[key] + _TINY) / (kept[key] + _TINY) >= gamma for key in lost}
    total, ascents = epochs * task.steps, math.ceil(task.steps / every)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, float | None]]:
        gone = task.forgets(ascents * task.forget_batch, "sfron", epoch)
        for step, (x, y) in enumerate(task.retained("sfron", epoch)):
            if step % every == 0:
                images, slots = next(gone)
                progress = (epoch * task.steps + step) / total
                yield images, task.labels[slots].to(task.device), alpha * (1 + math.cos(math.pi * progress)) / 2
            yield x, y, None

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor, float | None]) -> Tensor:
        x, labels, weight = batch
        if weight is None:
            return functional.cross_entropy(net(x), labels)
        ascent = -weight * focused(functional.cross_entropy(net(x), labels, reduction="none"), _FOCUS)
        return with_gradient(net, clipped_gradient(net, ascent, masks, clip))

    task.fit(model, "sfron", epochs=epochs, steps=task.steps + ascents, batches=batches, loss=loss, lr=lr)


def focused(losses: Tensor, power: float) -> Tensor:
    """Mean of the losses with weights 1 / loss^power, which are constants.

    Args:
        losses: (B,).
        power: lambda; 0 gives the plain mean.
    """
    weights = 1 / (losses.detach() ** power + _TINY)
    return (weights * losses).sum() / weights.sum()


def clipped_gradient(model: nn.Module, loss: Tensor, masks: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Parameter name -> gradient where the mask is true, else 0; scaled down to a norm of ``largest`` if longer."""
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    found = {key: value * masks[key] for key, value in zip(parameters, gradients, strict=True)}
    norm = torch.stack([value.float().norm() for value in found.values()]).norm()
    scale = (largest / (norm + 1e-6)).clamp_max(1)
    return {key: value * scale for key, value in found.items()}


def with_gradient(model: nn.Module, gradients: dict[str, Tensor]) -> Tensor:
    """A scalar with these gradients, so that the shared loop takes the step."""
    parameters = dict(model.named_parameters())
    return torch.stack([(parameters[key] * value).sum() for key, value in gradients.items()]).sum()
