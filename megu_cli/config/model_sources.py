"""The table of model sources: what a model's name begins with, and what that says before the model is made.

A new source is a row here and a class in `megu_cli.models`. Nothing is imported from there: a row names the class, and
`megu_cli.models.sources` imports it when the model is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megu_cli.config.base import is_path
from megu_cli.run.trees import Unknown, below

# What holds, or lists, the weights in a directory of transformers.
_HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def has_weights(folder: Path) -> bool:
    """Whether trained weights lie in a directory of transformers, or only the config of a model to be trained."""
    return any((folder / name).is_file() for name in _HF_WEIGHTS)


def _never(name: str) -> bool:
    return False


def _no_files(name: str, out: Path) -> Iterator[str]:
    return iter(())


@dataclass(frozen=True)
class ModelSource:
    """One kind of ``model.name``. In what follows, a name is what comes after the prefix.

    Attributes:
        prefix: What ``model.name`` begins with; empty: a network of megu's own.
        form: The form of ``model.name``, in descriptions and errors.
        architecture: The class, as ``module:Class`` in `megu_cli.models`; see `megu_cli.models.architecture`.
        placed: Called with a name and the path that it would be; True if it is one. A relative path is relative to the
            config. ``None``: it is never a path.
        trained: Called with a name; True if it stands for trained weights as well.
        directory: True if the name is a directory of transformers, or a hub id: then the unlearned model is written as
            such a directory.
        files: Called with a name and the run directory; gives the files that the architecture is read from, so that a
            change of them is noticed. It raises `Unknown` where there may be others.
        packages: Packages that make the model.
        library: Name of the library in a model card of the Hugging Face hub.
        pretrained: True if a new model of this kind may hold trained weights.
    """

    prefix: str
    form: str
    architecture: str
    placed: Callable[[str, Path], bool] | None = None
    trained: Callable[[str], bool] = _never
    directory: bool = False
    files: Callable[[str, Path], Iterator[str]] = _no_files
    packages: tuple[str, ...] = ()
    library: str = "pytorch"
    pretrained: bool = False


def _of_directory(name: str, out: Path) -> Iterator[str]:
    if not Path(name).is_absolute():
        raise Unknown  # a hub id may move
    return below(Path(name), out)


def _of_code(name: str, out: Path) -> Iterator[str]:
    raise Unknown  # code of the user's may read anything


_ROWS = (
    ModelSource(
        "hf:",
        "hf:DIRECTORY_OR_ID",
        "huggingface:HuggingFaceModel",
        placed=lambda name, place: is_path(name) or place.is_dir(),
        trained=lambda name: not is_path(name) or has_weights(Path(name)),
        directory=True,
        files=_of_directory,
        packages=("transformers", "huggingface_hub"),
        library="transformers",
    ),
    ModelSource("torchvision:", "torchvision:NAME", "libraries:TorchvisionModel", packages=("torchvision",)),
    ModelSource("timm:", "timm:NAME", "libraries:TimmModel", packages=("timm",), library="timm"),
    ModelSource(
        "python:",
        "python:MODULE:FACTORY",
        "factory:FactoryModel",
        placed=lambda name, place: True,
        files=_of_code,
        pretrained=True,
    ),
)
MODEL_SOURCES = {row.prefix: row for row in _ROWS}
_OWN = ModelSource("", "NAME", "networks:OwnNetwork")


def source_of(name: str) -> tuple[ModelSource, str]:
    """Return the source that a value of ``model.name`` begins with, and what follows the prefix."""
    row = next((row for row in MODEL_SOURCES.values() if name.startswith(row.prefix)), _OWN)
    return row, name.removeprefix(row.prefix)
