"""What is known of the inputs from one command to the next.

A command with nothing to do needs the digests of its inputs, not the inputs. The digests are remembered together with
evidence: the settings, the package versions, and the size and times of change of every file that they were computed
from. If anything in the evidence changes, all of it is forgotten.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import megu_cli
from megu_cli.config import Config
from megu_cli.config.places import DEBIAN_FASHION_MNIST, downloads
from megu_cli.errors import ArtifactError, MeguError
from megu_cli.models.user_model import UserModel
from megu_cli.run import artifacts, files, reading, writing

T = TypeVar("T")
# Sections and settings of the config that no input depends on.
_UNRELATED = {
    *("device", "checkpoint_seconds", "preset"),
    *("transition", "labels", "noise", "finetune", "train", "eval", "compare"),
}
# Packages that read data and models.
_PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "huggingface_hub", "safetensors"),
    *("numpy", "pillow", "scikit-learn", "datasets", "pyarrow", "pandas"),
)
# What torchvision's data sets unpack their files to.
_UNPACKED = ("FashionMNIST", "cifar-10-batches-py", "cifar-100-python")


class Unknown(Exception):  # noqa: N818 - no error: the inputs are then read
    """It cannot be told from files and settings alone whether an input has changed."""


class InputMemory:
    """Facts about the inputs of a run, such as their digests; each is computed once as long as the evidence holds.

    Args:
        config: The config.
        active: False: nothing is remembered.
    """

    def __init__(self, config: Config, active: bool = True) -> None:
        self.config, self.active = config, active
        self.file = config.out / files.INPUT_DIGESTS
        self._evidence: str | None = None
        self._facts: dict[str, Any] | None = None
        self._changed = False

    def begin(self) -> dict[str, Any]:
        """Take the evidence, before any input is read, and return the facts that it supports."""
        if self._facts is None:
            self._facts = {}
            if self.active:
                try:
                    self._evidence = evidence(self.config)
                except (Unknown, OSError, ValueError, csv.Error, MeguError):
                    self._evidence = None
                self._facts = self._load() if self._evidence else {}
        return self._facts

    def fact(self, name: str, compute: Callable[[], T]) -> T:
        """A fact, plain JSON data; computed if it is not known."""
        facts = self.begin()
        if name not in facts:
            value = compute()
            facts[name] = value
            self._changed = True
        known: T = facts[name]
        return known

    def forget(self) -> None:
        """Compute every fact anew."""
        self.begin()
        self._facts = {}

    def keep(self) -> None:
        """Write the facts to the run directory if any is new.

        Raises:
            ArtifactError: The file cannot be written.
        """
        if not (self._changed and self._evidence and self._facts) or self.file.is_symlink():
            return
        content = {"evidence": self._evidence, "facts": self._facts}
        with writing.replacing(self.file) as temporary:
            temporary.write_bytes(artifacts.canonical({**content, "checksum": artifacts.digest(content)}))
        self._changed = False

    def _load(self) -> dict[str, Any]:
        """The facts in the file, if it is whole and has this evidence."""
        try:
            content = artifacts.strict_json(reading.content(self.file))
            checksum = content.pop("checksum")
            if checksum == artifacts.digest(content) and content["evidence"] == self._evidence:
                return dict(content["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArtifactError):
            pass
        return {}


def evidence(config: Config) -> str:
    """Digest of everything that the inputs of a config depend on: settings, versions, and stamps of files.

    Raises:
        Unknown: An input depends on more than that.
        OSError, MeguError: A file or folder cannot be looked at.
    """
    total = hashlib.sha256()
    package = Path(megu_cli.__file__).parent
    versions = {name: _version(name) for name in _PACKAGES}
    settings = config.model_dump(mode="json", exclude=_UNRELATED)
    total.update(artifacts.canonical([megu_cli.__version__, sys.version, versions, settings]))
    for stamp in _stamps(sorted(package.rglob("*.py"))):
        total.update(stamp)
    for stamp in _stamps(_sources(config)):
        total.update(stamp)
    return total.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _stamps(paths: Any) -> Iterator[bytes]:
    """Path, size and times of change of each file; a missing one is evidence too."""
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - called for every image
            text = f"{path}\0{status.st_mode}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
        except (FileNotFoundError, NotADirectoryError):
            text = f"{path}\0-\0"
        yield text.encode(errors="surrogateescape")


def _sources(config: Config) -> Iterator[str | Path]:
    """Every file and folder that the digests of the inputs are computed from.

    Raises:
        Unknown: There are others.
    """
    yield from _data(config)
    yield from _model(config)
    if oracle := config.eval.own_oracle:
        yield from _walk(oracle, config.out) if oracle.is_dir() else [oracle]
    forget, rater = config.forget, config.mllm
    if forget.samples:
        yield forget.samples
    for path in forget.already or []:
        if path.suffix in (".yaml", ".yml"):
            raise Unknown  # a config leads to other files
        yield path
        yield path / files.FINETUNE
    if "ratings" in rater.rater.inputs:
        from megu_cli.mllm.recorded import shipped

        yield rater.ratings or shipped(config.data.name)
    if isinstance(rater.model, Path):
        yield from _walk(rater.model, config.out)


def _data(config: Config) -> Iterator[str | Path]:
    data = config.data
    if data.name == "digits":
        found = importlib.util.find_spec("sklearn")
        if found is None or not found.origin:
            raise Unknown
        yield Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    elif data.name == "manifest" and data.manifest:
        yield data.manifest
        yield from _named(data.manifest, data.root or data.manifest.parent)
    elif data.name in ("imagefolder", "hf_dataset") and data.root:
        yield from _walk(data.root, config.out)
    else:
        for folder in [data.root] if data.root else [DEBIAN_FASHION_MNIST, downloads()]:
            yield folder
            if folder.is_dir():
                yield from sorted(path for path in folder.iterdir() if path.is_file())
            for name in _UNPACKED:
                yield from _walk(folder / name, config.out)


def _named(manifest: Path, root: Path) -> Iterator[str]:
    """The images that a manifest names."""
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


def _model(config: Config) -> Iterator[str | Path]:
    source, _, name = config.model.name.partition(":")
    if source == "python" or config.model.trust_remote_code or (source == "hf" and not Path(name).is_absolute()):
        raise Unknown  # code of the user's may read anything; a hub id may move
    if source == "hf":
        yield from _walk(Path(name), config.out)
    if isinstance(config.model.classes, Path):
        yield config.model.classes
    checkpoint = UserModel(config.model, config.data).checkpoint
    if checkpoint is not None:
        yield checkpoint
        if checkpoint.is_dir():
            yield from _walk(checkpoint, config.out)
        # Records of earlier requests may lie beside it.
        for folder in (config.out, checkpoint.parent, checkpoint.parent.parent):
            yield folder / files.FINETUNE


def _walk(folder: Path, out: Path) -> Iterator[str]:
    """All folders and files below a folder, in order; links are followed.

    Raises:
        Unknown: The run directory lies in the folder, and so changes it; or a link leads back.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise Unknown
    waiting, seen = [str(folder)], set()
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            raise Unknown
        seen.add(real)
        yield here
        if os.path.isdir(here):  # noqa: PTH112 - strings: there may be a million files
            with os.scandir(here) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir():
                        waiting.append(entry.path)
                    else:
                        yield entry.path
