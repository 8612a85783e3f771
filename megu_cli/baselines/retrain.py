"""Retrain from scratch without the forget set: the oracle.

Paper: none; exact unlearning by definition.
Reference: none.
Notes: Every randomly initialised layer is initialised anew, not the last one alone. `megu train --retain-only` and
the oracle of `megu compare` run this.
"""

from __future__ import annotations

from torch import nn

from megu_cli.baselines.task import Task
from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.training import Checkpoints, History, train_classifier


def retrain(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    augment: str,
    checkpoints: Checkpoints | None = None,
    crew: Processes = SINGLE,
) -> History:
    """Replace the model's weights by those of a training on D_r alone; the settings are the original's recipe."""
    model.load_state_dict(task.fresh("oracle").state_dict())
    return train_classifier(
        model,
        task.split,
        task.retain,
        epochs=epochs,
        batch=batch,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        augment=augment,
        seed=task.seed,
        label="oracle",
        validate=task.accuracy if len(task.validation) else None,
        device=task.device,
        checkpoints=checkpoints,
        crew=crew,
        track=task.track,
    )
