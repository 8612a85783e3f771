"""Amnesiac: train the forgotten images on random wrong labels.

Paper: Graves et al., 2021, Amnesiac Machine Learning, arXiv:2010.10981 (its unlearning by relabelling).
Reference: https://github.com/lmgraves/AmnesiacML
Notes: A wrong label is drawn once per image, evenly over the classes that are not forgotten, and one relabelled data
set is shuffled, as in the reference. SGD in place of Adam.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megu_cli.baselines.task import BASELINE_EPOCHS, Task
from megu_cli.execution.runtime import generator


def amnesiac(model: nn.Module, task: Task, *, epochs: int = BASELINE_EPOCHS, lr: float = 0.005) -> None:
    """Minimise the cross-entropy on D_r and on D_f with wrong labels.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
    """
    wrong = wrong_labels(task.labels, task.classes, task.forgotten, generator(task.seed, "amnesiac", "labels"))
    task.fit_relabelled(model, "amnesiac", lambda epoch: wrong, epochs=epochs, lr=lr)


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
