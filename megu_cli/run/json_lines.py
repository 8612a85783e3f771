"""Files of JSON lines that grow: each line carries its own checksum, and a damaged one costs nothing but itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megu_cli.errors import ArtifactError
from megu_cli.run import artifacts, writing
from megu_cli.text import printable

_BEGINNING = b'{"checksum": "'


class JSONLines:
    """A file with one JSON object a line.

    Args:
        path: The file; it need not be there.
        lost: What becomes of a damaged line, in words: "asked again".
    """

    def __init__(self, path: Path, lost: str) -> None:
        self.path, self.lost = path, lost
        self._said = False

    def read(self) -> list[dict[str, Any]]:
        """The sound lines, without their checksums; how many are damaged is said once.

        Raises:
            ArtifactError: The file is there and cannot be read.
        """
        try:
            with artifacts.opened(self.path) as stream:
                lines = [line for line in stream.read().split(b"\n") if line.strip()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror or error}") from None
        entries = [entry for line in lines if (entry := _sound(line)) is not None]
        if (bad := len(lines) - len(entries)) and not self._said:
            self._said = True
            what = f"{bad} of {len(lines)} lines {'is' if bad == 1 else 'are'} damaged or without a checksum"
            print(f"{printable(str(self.path))}: {what}: {self.lost}", file=sys.stderr, flush=True)  # noqa: T201
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line, synced to disk; safe beside other threads and processes that append.

        Raises:
            ArtifactError: The file cannot be written, or is a symbolic link.
        """
        if self.path.is_symlink():
            raise writing.linked(self.path)
        # ASCII only, so that a line cut anywhere is still text.
        line = json.dumps({"checksum": artifacts.digest(entry), **entry}, allow_nan=False).encode("ascii") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Non-blocking: a pipe without a reader is refused rather than waited for.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
            with os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0) as stream:
                if not self.path.is_file():
                    raise ArtifactError(f"{self.path} is no regular file")
                _lock(stream.fileno())
                _write(stream.fileno(), _end_last_line(stream.fileno()) + line)
                os.fsync(stream.fileno())
        except OSError as error:
            raise writing.unwritable(self.path, error) from None


def _sound(line: bytes) -> dict[str, Any] | None:
    """The entry in a line; ``None`` if it does not match its checksum."""
    try:
        entry: dict[str, Any] = artifacts.strict_json(line)
        checksum = entry.pop("checksum")
        return entry if checksum == artifacts.digest(entry) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _lock(descriptor: int) -> None:
    """Be the only one who appends, until the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows: the lock of the run directory has to do
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _end_last_line(descriptor: int) -> bytes:
    """What ends a last line that lacks its end; a line of ours that a kill or a full disk has torn is cut off."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = b"".join(iter(lambda: os.read(descriptor, 1 << 20), b"")) if not _ended(descriptor, size) else b""
    last = content.rpartition(b"\n")[2]
    if not last:
        return b""
    if _sound(last) is None and last[: len(_BEGINNING)] == _BEGINNING[: len(last)]:
        os.ftruncate(descriptor, size - len(last))
        return b""
    return b"\n"


def _ended(descriptor: int, size: int) -> bool:
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
