"""Files are read as a whole, and only regular ones: a pipe or a device is never waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class NoRegularFileError(OSError):
    """What stands there is a folder, a pipe or a device."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened for reading.

    Raises:
        OSError: It is not there, cannot be read, or is no regular file.
    """
    # A pipe without a writer would block the opening itself.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise NoRegularFileError(errno.EINVAL, "it is no regular file", str(path))
        yield stream


def content(path: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: As `opened`.
    """
    with opened(path) as stream:
        return stream.read()
