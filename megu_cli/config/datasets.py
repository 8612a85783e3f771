"""The table of data sets: how each is loaded and normalised, and which files it is read from.

A new data set is a row here and a loader in `megu_cli.data`. Nothing is imported from there: a row names the loader,
and `megu_cli.data.loading` imports it when the images are read.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megu_cli.config.places import DEBIAN_FASHION_MNIST, downloads
from megu_cli.run import reading
from megu_cli.run.trees import Unknown, below

if TYPE_CHECKING:
    from megu_cli.config.sources import DataConfig

_Channels = tuple[float, ...]
_Files = Iterator[str | Path]
_IMAGENET: tuple[_Channels, _Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR: tuple[_Channels, _Channels] = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _no_folder(settings: DataConfig) -> None:
    return None


@dataclass(frozen=True)
class DataSource:
    """One value of ``data.name``.

    Attributes:
        name: The value.
        loader: The loader, as ``module:function`` in `megu_cli.data`. It takes ``data.root``; a loader of images of the
            user's own takes a `megu_cli.data.own.UserData`.
        normalisation: Mean and standard deviation of each channel, of pixels from 0 to 1.
        files: Called with the section ``data`` and the run directory; gives every file and folder that the images and
            labels are read from, so that a change of them is noticed. It raises `Unknown` where there are others.
        users: True: images of the user's own, of any size. False: small images of one size, which models take as they
            are.
        folder: Called with the section ``data``; gives the folder that the names of images are relative to, ``None``
            where these are no paths.
        rated: True if recorded ratings of its classes come with megu, in ``megu_cli/mllm/ratings/NAME.json``.
        packages: Packages that read it.
    """

    name: str
    loader: str
    normalisation: tuple[_Channels, _Channels]
    files: Callable[[DataConfig, Path], _Files]
    users: bool = False
    folder: Callable[[DataConfig], Path | None] = _no_folder
    rated: bool = False
    packages: tuple[str, ...] = ()


def _of_sklearn(settings: DataConfig, out: Path) -> _Files:
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.origin:
        raise Unknown
    yield Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _of_torchvision(unpacked: str) -> Callable[[DataConfig, Path], _Files]:
    """The files of a data set of torchvision, which unpacks them to a folder of this name."""

    def files(settings: DataConfig, out: Path) -> _Files:
        for folder in [settings.root] if settings.root else [DEBIAN_FASHION_MNIST, downloads()]:
            yield folder
            if folder.is_dir():
                yield from sorted(path for path in folder.iterdir() if path.is_file())
            yield from below(folder / unpacked, out)

    return files


def _in_root(settings: DataConfig, out: Path) -> _Files:
    if settings.root is not None:
        yield from below(settings.root, out)


def _beside_manifest(settings: DataConfig) -> Path | None:
    return settings.root or (settings.manifest.parent if settings.manifest else None)


def _in_manifest(settings: DataConfig, out: Path) -> _Files:
    """The manifest, and the images that it names."""
    manifest, root = settings.manifest, _beside_manifest(settings)
    if manifest is None:
        return
    yield manifest
    with reading.opened(manifest) as stream:
        lines = (line.decode("utf-8-sig") for line in stream)
        rows = csv.reader(lines)
        columns = [name.strip().lower() for name in next((row for row in rows if any(map(str.strip, row))), [])]
        if "path" not in columns:
            raise Unknown
        place = columns.index("path")
        for row in rows:
            if place < len(row):
                path = f"{root}/{row[place].strip()}"
                if not os.path.isfile(path):  # noqa: PTH113 - called for every image
                    raise Unknown  # it is written in another way, or is not there
                yield path


_TORCHVISION = ("torchvision",)
_ROWS = (
    DataSource(
        "digits",
        "builtin:digits",
        ((0.3,), (0.37,)),
        _of_sklearn,
        rated=True,
        packages=("scikit-learn",),
    ),
    DataSource(
        "fashion_mnist",
        "builtin:fashion_mnist",
        ((0.2860,), (0.3530,)),
        _of_torchvision("FashionMNIST"),
        rated=True,
        packages=_TORCHVISION,
    ),
    DataSource("cifar10", "builtin:cifar10", _CIFAR, _of_torchvision("cifar-10-batches-py"), packages=_TORCHVISION),
    DataSource("cifar20", "builtin:cifar20", _CIFAR, _of_torchvision("cifar-100-python"), packages=_TORCHVISION),
    DataSource("cifar100", "builtin:cifar100", _CIFAR, _of_torchvision("cifar-100-python"), packages=_TORCHVISION),
    DataSource(
        "imagefolder", "own:imagefolder", _IMAGENET, _in_root, users=True, folder=lambda settings: settings.root
    ),
    DataSource("manifest", "own:manifest", _IMAGENET, _in_manifest, users=True, folder=_beside_manifest),
    DataSource(
        "hf_dataset",
        "hub:hf_dataset",
        _IMAGENET,
        _in_root,
        users=True,
        packages=("datasets", "pyarrow", "pandas"),
    ),
)
DATA_SOURCES = {row.name: row for row in _ROWS}

# The values of ``data.name``.
_NAMES = tuple(DATA_SOURCES)
if TYPE_CHECKING:
    DataName = str
else:
    DataName = Literal[_NAMES]
