"""What is known of the inputs from one command to the next.

A command with nothing to do needs the digests of its inputs, not the inputs. The digests are remembered together with
evidence: the settings, the package versions, and the size and times of change of every file that they were computed
from. If anything in the evidence changes, all of it is forgotten.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import megu_cli
from megu_cli.config import Config
from megu_cli.config.datasets import DATA_SOURCES
from megu_cli.config.model_sources import MODEL_SOURCES
from megu_cli.errors import ArtifactError, MeguError
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.run import artifacts, files, reading, writing
from megu_cli.run.trees import Unknown

T = TypeVar("T")
# Sections and settings of the config that no input depends on.
_UNRELATED = {
    *("device", "checkpoint_seconds"),
    *("transition", "labels", "noise", "finetune", "train", "eval", "compare", "tracking"),
}
# Packages that read data and models.
_PACKAGES = dict.fromkeys(
    [
        *("torch", "safetensors", "numpy", "pillow"),
        *(package for source in DATA_SOURCES.values() for package in source.packages),
        *(package for source in MODEL_SOURCES.values() for package in source.packages),
    ]
)


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
    source = config.transition.source  # whether a rater is asked
    total.update(artifacts.canonical([megu_cli.__version__, sys.version, versions, settings, source]))
    for stamp in _stamps(sorted(package.rglob("*.py"))):
        total.update(stamp)
    for row in INPUTS.values():
        for stamp in _stamps(row.files(config)):
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
