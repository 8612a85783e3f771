"""Do nothing: the model as it was.

Paper: none.
Reference: none.
Notes: The row that every other is measured from.
"""

from __future__ import annotations

from torch import nn

from megu_cli.baselines.task import Task


def original(model: nn.Module, task: Task) -> None:
    """Leave the model as it is."""
