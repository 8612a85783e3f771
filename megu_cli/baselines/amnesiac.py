"""Amnesiac: train the forgotten images on random wrong labels.

Paper: Graves et al., 2021, Amnesiac Machine Learning, arXiv:2010.10981 (its unlearning by relabelling).
Reference: https://github.com/lmgraves/AmnesiacML
Notes: A wrong label is drawn once per image, evenly over the classes that are not forgotten. Each step takes retained
and forgotten images together, in a fixed ratio; the paper shuffles one relabelled data set.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import BASELINE_EPOCHS, Task, together
from megu_cli.execution.runtime import generator


def amnesiac(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = BASELINE_EPOCHS,
    lr: float = 0.01,
    weight: float = 0.2,
    name: str = "amnesiac",
) -> None:
    """Minimise CE(D_r) + weight CE(D_f with wrong labels).

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        weight: Of the loss on relabelled images.
        name: Names the random streams and the progress.
    """
    wrong = wrong_labels(task.labels, task.classes, task.forgotten, generator(task.seed, name, "labels"))

    def loss(net: nn.Module, x: Tensor, y: Tensor, gone: Tensor, slots: Tensor) -> Tensor:
        kept, lost = together(net, x, gone)
        relabelled = functional.cross_entropy(lost, wrong[slots].to(y.device))
        return functional.cross_entropy(kept, y) + weight * relabelled

    # Decay would move weights that SalUn's mask is to keep.
    task.fit_pairs(model, name, loss, epochs=epochs, lr=lr, weight_decay=0.0)


def wrong_labels(labels: Tensor, classes: int, forgotten: list[int], draw: torch.Generator) -> Tensor:
    """(N,) labels drawn evenly from the retained classes, never the true one.

    Args:
        labels: (N,) true labels.
        classes: Number of classes K.
        forgotten: Classes that may not be drawn.
        draw: Random generator.
    """
    allowed = torch.ones(len(labels), classes)
    allowed[:, forgotten] = 0
    allowed[torch.arange(len(labels)), labels] = 0
    return torch.multinomial(allowed, 1, generator=draw)[:, 0]
