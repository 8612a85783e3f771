"""The original model of a run: its architecture, and the weights that unlearning starts from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megu_cli.config import ModelConfig
from megu_cli.errors import CheckpointError
from megu_cli.models.user_model import UserModel

if TYPE_CHECKING:
    from torch import nn

    from megu_cli.data import Dataset
    from megu_cli.models.checkpoints import Checkpoint
    from megu_cli.models.weights import State


class OriginalModel:
    """The original model. Its weights are read once, when they are first needed.

    Args:
        settings: The config's section ``model``.
        user_model: The user's model, which may have weights.
        trained: The file that `megu train` writes if the user gives no weights.
        data: Returns the data set, which has the number of classes and channels.
    """

    def __init__(
        self, settings: ModelConfig, user_model: UserModel, trained: Path, data: Callable[[], Dataset]
    ) -> None:
        self._settings, self._user_model, self._trained, self._data = settings, user_model, trained, data

    @property
    def path(self) -> Path:
        """The user's checkpoint, or the one that `megu train` writes."""
        return self._user_model.checkpoint or self._trained

    def network(self) -> nn.Module:
        """Return a newly initialised model on the CPU; it draws from torch's global random state."""
        from megu_cli.models.sources import build

        data, settings = self._data(), self._settings
        return build(settings.name, len(data.classes), data.channels, settings.trust_remote_code)

    @property
    def weights(self) -> State:
        """The weights, by the model's own names, in the file's dtypes.

        Raises:
            CheckpointError: They cannot be read.
        """
        return self._directory if self.path.is_dir() else self.file.state

    @cached_property
    def file(self) -> Checkpoint:
        """The checkpoint file, taken apart.

        Raises:
            CheckpointError: It cannot be read.
        """
        from megu_cli.models.checkpoints import read

        return read(self.path, self.network(), self._settings.key if self._user_model.checkpoint else None)

    @cached_property
    def _directory(self) -> State:
        return self.read_directory(self.path, "model.checkpoint")

    def read_directory(self, path: Path, setting: str) -> State:
        """Return the weights in the directory of a ``hf:`` model of this architecture.

        Args:
            path: The directory.
            setting: The setting that names it, for messages.

        Raises:
            CheckpointError: The model is no ``hf:`` model, or the weights cannot be read.
        """
        from megu_cli.models.huggingface import read

        if not self._user_model.folder:
            raise CheckpointError(f"{setting}: {path} is a directory", "Name a file, or use model.name: hf:DIR.")
        return read(path, len(self._data().classes), self._settings.trust_remote_code)
