"""What megu asks of a model's source; a class for each source answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from megu_cli.data.decode import Preprocessing


@dataclass(frozen=True)
class Architecture:
    """A model by its name, before it is made.

    Attributes:
        given: The setting ``model.name``.
        name: What follows the prefix of its source.
        trust_remote_code: True if code that comes with the model may run.
    """

    given: str
    name: str
    trust_remote_code: bool = False

    def check(self) -> None:
        """See that there is such a model, as far as that can be told without making it.

        Raises:
            ConfigError: There is none.
        """

    def build(self, classes: int, channels: int) -> nn.Module:
        """Return a newly initialised model, from torch's global random state.

        Raises:
            ConfigError: It cannot be made.
        """
        raise NotImplementedError

    def channels(self) -> int | None:
        """Return the input channels that the model insists on; ``None`` where it takes the data set's."""
        return None

    def preprocessing(self, folder_like: bool) -> Preprocessing:
        """Return what the model says of its input; see `megu_cli.models.sources.preprocessing_of`."""
        return Preprocessing()

    def identity(self) -> Any:
        """Return what determines the architecture, as plain data without paths."""
        return self.given
