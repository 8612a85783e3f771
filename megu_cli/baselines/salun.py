"""SalUn: random labels, but only the weights that matter to the forget set move.

Paper: Fan et al., 2024, SalUn, arXiv:2310.12508.
Reference: https://github.com/OPTML-Group/Unlearn-Saliency
Notes: An epoch is a pass over D_f, with labels drawn anew evenly over all classes, and then one over D_r, as in the
reference for CIFAR-10. The learning rate falls as a cosine. The gradients of the batches are summed in eval mode. There
is no weight decay, which in the reference moves the masked weights too; here they stay exactly as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import BASELINE_EPOCHS, Task, summed
from megu_cli.execution.runtime import generator
from megu_cli.training import masked_gradients


def salun(model: nn.Module, task: Task, *, epochs: int = BASELINE_EPOCHS, lr: float = 0.05, share: float = 0.5) -> None:
    """Train on D_r and on D_f with random labels, the salient weights alone.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        share: Of the weights that may move.
    """
    passes = math.ceil(len(task.forget) / task.batch)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(task.seed, "salun", "labels", epoch)
        wrong = torch.randint(0, task.classes, (len(task.forget),), generator=draw)
        for gone, slots in task.forgets(len(task.forget), "salun", epoch, batch=task.batch):
            yield gone, wrong[slots].to(gone.device)
        yield from task.retained("salun", epoch)

    with masked_gradients(model, saliency_mask(forget_gradient(model, task), share)):
        task.fit(
            model,
            "salun",
            epochs=epochs,
            steps=passes + task.steps,
            batches=batches,
            loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
            lr=lr,
            weight_decay=0.0,
        )


def forget_gradient(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Gradient of the summed cross-entropy on D_f, parameter by parameter; the model stays as it is."""
    return summed(task.gradients(model, task.forget, "sum"))


def saliency_mask(gradient: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """1 where the gradient's magnitude is among the largest ``share`` of all parameters together, else 0."""
    sizes = torch.cat([value.abs().flatten() for value in gradient.values()])
    keep = max(1, round(share * len(sizes)))
    chosen = torch.zeros_like(sizes)
    chosen[sizes.topk(keep).indices] = 1
    parts = chosen.split([value.numel() for value in gradient.values()])
    return {key: part.view_as(value) for (key, value), part in zip(gradient.items(), parts, strict=True)}
