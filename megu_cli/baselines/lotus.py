"""LoTUS: teach the forgotten images the original's outputs, smoothed until they are classified like unseen ones.

Paper: Spartalis et al., 2025, LoTUS: Large-Scale Machine Unlearning with a Taste of Uncertainty, arXiv:2503.18314.
Reference: https://github.com/cspartalis/LoTUS, src/unlearning_methods/lotus_class.py
Notes: As in the reference, targets are Gumbel-softmax draws, one-hot ones for retained images; 30% of D_R take part;
and the accuracy that is aimed at is 0 for whole classes, else the original's on held-out images. An epoch is a pass
over D_f and this part of D_R, which is never more than an epoch of other methods has: the temperature follows the
accuracy once per epoch, and after many steps in between it swings. AdamW, whose learning rate falls as a cosine; it is
constant in the reference. There ``alpha`` is 32 for classes, 2 for most random requests and 8 for CIFAR-10's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import Task, teacher
from megu_cli.errors import MeguError
from megu_cli.execution.runtime import generator
from megu_cli.models.features import evaluating
from megu_cli.training import accuracy, shuffled

# The original's accuracy may be undercut by this before the training ends.
_MARGIN = 0.01


def lotus(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 10,
    lr: float = 0.0001,
    alpha: float = 0.0,
    subset: float = 0.3,
) -> None:
    """Minimise the cross-entropy to smoothed outputs of the original on D_f and to drawn classes on a part of D_R.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes, at most: the training ends when the accuracy on D_f is below its target.
        lr: AdamW learning rate at the start.
        alpha: The temperature is exp(alpha (accuracy on D_f - target)); 0 means 32 for whole classes, else 2.
        subset: Fraction of D_R that takes part.

    Raises:
        MeguError: There are no held-out images to take the target from.
    """
    original, aim = teacher(model), target_accuracy(model, task)
    alpha = alpha or (32.0 if task.of_classes else 2.0)
    order = torch.randperm(len(task.retain), generator=generator(task.seed, "lotus", "subset"))
    both = torch.cat([task.retain[order[: max(1, min(round(subset * len(order)), task.samples))]], task.forget])
    gone = torch.zeros(len(task.split), dtype=torch.bool)
    gone[task.forget] = True

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        with evaluating(model):
            excess = accuracy(model, task.split, task.forget, task.execution.unshared) - aim
        if excess <= -_MARGIN:
            return  # ends the training
        positions = shuffled(both, len(both), task.batch, task.seed, "lotus", epoch)
        for index, x in zip(positions, task.split.batches(positions, task.device), strict=True):
            yield x, gone[index].to(task.device), math.exp(alpha * excess)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor, float]) -> Tensor:
        x, forgotten, temperature = batch
        with torch.no_grad():
            logits = original(x).float()
            soft = functional.gumbel_softmax(logits, temperature)
            hard = functional.gumbel_softmax(logits, hard=True)
        return functional.cross_entropy(net(x), torch.where(forgotten[:, None], soft, hard))

    task.fit(
        model,
        "lotus",
        epochs=epochs,
        steps=math.ceil(len(both) / task.batch),
        batches=batches,
        loss=loss,
        lr=lr,
        optimizer="adamw",
    )


def target_accuracy(model: nn.Module, task: Task) -> float:
    """The accuracy on D_f to aim at: 0 on whole classes, elsewhere the model's on held-out images.

    Raises:
        MeguError: There are none.
    """
    staying = ~task.of_forgotten_classes
    if not staying.any():
        return 0.0
    if not len(task.validation):
        raise MeguError("lotus: no held-out images to take the target accuracy from", "Raise data.validation.")
    with evaluating(model):
        return task.accuracy(model) * staying.double().mean().item()
