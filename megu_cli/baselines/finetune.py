"""Finetune on what is retained, and trust in catastrophic forgetting.

Paper: Golatkar et al., 2020, Eternal Sunshine of the Spotless Net, arXiv:1911.04933 (its finetuning baseline).
Reference: none.
Notes: A higher learning rate than an ordinary finetuning has, as the paper does, since a low one forgets nothing.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import Task


def finetune(model: nn.Module, task: Task, *, epochs: int = 3, lr: float = 0.1, name: str = "finetune") -> None:
    """Train on D_r by cross-entropy.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        name: Names the random streams and the progress; other methods end with this one.
    """

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(net(x), y)

    task.fit_retained(model, name, loss, epochs=epochs, lr=lr)
