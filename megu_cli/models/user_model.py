"""The user's model, as the config names it: its directory, weights, classes, and how it wants its images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.config import DataConfig, ModelConfig, has_weights
from megu_cli.config.model_sources import source_of
from megu_cli.run import artifacts

if TYPE_CHECKING:
    from megu_cli.data import Preprocessing


class UserModel:
    """What is known of a model before its weights are read.

    Args:
        settings: The config's section ``model``.
        data: The config's section ``data``.
    """

    def __init__(self, settings: ModelConfig, data: DataConfig) -> None:
        self.settings, self.data = settings, data

    @cached_property
    def folder(self) -> Path | None:
        """The directory of a model of transformers."""
        source, name = source_of(self.settings.name)
        if not source.directory:
            return None
        folder = Path(name)
        if folder.is_absolute() and (folder / "config.json").is_file():
            return folder
        from megu_cli.models.huggingface import folder_of

        return folder_of(name)

    @cached_property
    def checkpoint(self) -> Path | None:
        """The user's trained weights: a file, or a directory of transformers; ``None``: `megu train` makes them."""
        given, folder = self.settings.checkpoint, self.folder
        if folder is None:
            return given
        if given is None:
            return folder if has_weights(folder) else None
        # transformers may rename what is in such a file while it reads its directory.
        whole = not given.is_dir() and has_weights(given.parent) and (given.parent / "config.json").is_file()
        return given.parent if whole and given.name in ("model.safetensors", "pytorch_model.bin") else given

    @property
    def foreign(self) -> bool:
        """Whether the checkpoint is there and not one that `megu train` made: what it was trained on is not known."""
        own = self.checkpoint
        if own is None or not own.exists():
            return False
        return own.is_dir() or own.suffix != ".safetensors" or not artifacts.is_ours(own)

    @cached_property
    def advised(self) -> Preprocessing:
        """How the model itself says that images are to be prepared, whatever the config says."""
        from megu_cli.models.sources import preprocessing_of

        settings = self.settings
        return preprocessing_of(settings.name, self.data.source.users, settings.trust_remote_code)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared: as the config says, else the model, else (``None``) the data set."""
        from dataclasses import replace

        settings, size, own = self.settings, self.data.image_size, self.advised
        if size is not None and size != own.image_size:
            own = replace(own, image_size=size, crop=1.0, stretch=False)
        if settings.channel_order is not None:
            own = own.ordered(settings.channel_order == "bgr")
        if settings.mean is not None and settings.std is not None:
            own = replace(own, mean=tuple(settings.mean), std=tuple(settings.std))
        return own

    @cached_property
    def architecture(self) -> Any:
        """The model, and what is done to its input, in an artifact's key: plain data without paths."""
        from megu_cli.models.sources import identity_of

        settings, own = self.settings, self.preprocessing
        name = identity_of(settings.name, settings.trust_remote_code)
        # The size is part of the data's digest. Keys of models that need none of this stay as they were.
        more: dict[str, Any] = {}
        if own.mean is not None and own.std is not None:
            more = {"mean": list(own.mean), "std": list(own.std)}
        if own.bgr:
            more["channel_order"] = "bgr"
        if settings.precision != "auto":
            more["precision"] = settings.precision
        return {"model": name, **more} if more or not isinstance(name, str) else name

    @cached_property
    def classes(self) -> list[str] | None:
        """The names in ``model.classes``."""
        from megu_cli.models.class_names import read_names

        given = self.settings.classes
        return read_names(given) if isinstance(given, Path) else given

    def order_of(self, classes: list[str]) -> list[int]:
        """For each output of the model the position of its class in the data, whose ``classes`` these are."""
        from megu_cli.models.class_names import match

        if self.classes is not None:
            return match(self.classes, classes, "model.classes", exact=True)
        if folder := self.folder:
            from megu_cli.models import huggingface

            labels = huggingface.class_names(str(folder), self.settings.trust_remote_code)
            # Where there is nothing but a config, its names are kept if they fit.
            if labels and (has_weights(folder) or sorted(labels) == sorted(classes)):
                return match(labels, classes, f"id2label of hf:{folder.name}")
        return list(range(len(classes)))
