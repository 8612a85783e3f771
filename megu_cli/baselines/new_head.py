"""A new head on the old features: a cheat.

Paper: none.
Reference: none.
Notes: The classifier is drawn anew and learns on retained images what the original says of the retained classes. All
other weights and batch-norm statistics stay as they were, so the features know what is forgotten as well as before.
It stands in the tables to show which metrics look at the last layer alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megu_cli.baselines.mask import mask
from megu_cli.baselines.task import Task, divergence, teacher
from megu_cli.models.features import classifier


def new_head(model: nn.Module, task: Task, *, epochs: int = 3, lr: float = 0.01) -> None:
    """Minimise KL(original without the forgotten classes || student) on D_r over the classifier's weights.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
    """
    original, head = teacher(model), classifier(model, task.classes)
    head.load_state_dict(classifier(task.fresh("new_head"), task.classes).state_dict())

    def loss(net: nn.Module, x: Tensor, _: Tensor) -> Tensor:
        net.eval()
        with torch.no_grad():
            target = mask(original(x), task.forgotten)
        return divergence(net(x), target)

    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    head.requires_grad_(True)
    try:
        task.fit_retained(model, "new_head", loss, epochs=epochs, lr=lr)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
