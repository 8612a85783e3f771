"""Retrain from scratch without the forget set: the oracle.

Paper: none; exact unlearning by definition.
Reference: none.
Notes: Every randomly initialised layer is initialised anew, not the last one alone. `megu train --retain-only` and
the oracle of `megu compare` run this.
"""

from __future__ import annotations

from torch import nn

from megu_cli.baselines.task import Task
from megu_cli.config import TrainConfig
from megu_cli.training import History, train_classifier


def retrain(model: nn.Module, task: Task, recipe: TrainConfig) -> History:
    """Replace the model's weights by those of a training on D_r alone, by the original's recipe."""
    model.load_state_dict(task.fresh("oracle").state_dict())
    return train_classifier(
        model,
        task.split,
        task.retain,
        recipe,
        label="oracle",
        validate=task.accuracy if len(task.validation) else None,
        execution=task.execution,
    )
