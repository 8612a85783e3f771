"""The files below a folder, as evidence of what a digest was computed from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


class Unknown(Exception):  # noqa: N818 - no error: the inputs are then read
    """It cannot be told from files and settings alone whether an input has changed."""


def below(folder: Path, out: Path) -> Iterator[str]:
    """All folders and files below a folder, in order; links are followed.

    Args:
        folder: The folder; it comes first, and need not be there.
        out: The run directory.

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
