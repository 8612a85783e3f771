"""Digests of files, remembered from one command to the next."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.errors import DataError, Faults
from megu_cli.run import artifacts, writing

if TYPE_CHECKING:
    import numpy as np

# A file is recognised by 16 bytes made of its path, size and times of change: 48 bytes a file, and no names.
_FIELDS = [("stamp", "<u8"), ("check", "<u8"), ("digest", "u1", (32,))]
_AT_ONCE = 4096
# Stamp and check of the last row, whose digest is the sha256 of all rows before it.
_SEAL = 2**64 - 1

Inspect = Callable[[str, bytes], None]


class FileDigestCache:
    """sha256 of files by path, size and times of change.

    Args:
        file: Where it is kept; without one, nothing is remembered.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._known: np.ndarray[Any, Any] | None = None
        self._new: list[np.ndarray[Any, Any]] = []

    def digests(self, paths: Iterable[str], inspect: Inspect | None = None) -> np.ndarray[Any, Any]:
        """sha256 of each file, (N, 32) uint8; only what is not remembered is read.

        Args:
            paths: The files.
            inspect: Given a file's path and its bytes when it is read; what it finds at fault it raises. Only files
                that pass are remembered.

        Raises:
            DataError: Files cannot be read, or do not pass; the first five are named.
        """
        import numpy as np

        blocks: list[np.ndarray[Any, Any]] = [np.empty((0, 32), np.uint8)]
        faults = Faults("files cannot be used")
        source = iter(paths)
        while block := list(itertools.islice(source, _AT_ONCE)):
            stamps = np.zeros(len(block), _FIELDS)
            there = np.ones(len(block), bool)
            for i, path in enumerate(block):
                try:
                    stamps[i]["stamp"], stamps[i]["check"] = _stamp(path)
                except (OSError, DataError) as error:
                    there[i] = False
                    faults.add(_reason(path, error))
            fresh = there & ~self._recall(stamps)
            for i in np.flatnonzero(fresh).tolist():
                try:
                    stamps[i]["digest"] = np.frombuffer(_read(block[i], inspect), np.uint8)
                except (OSError, DataError) as error:
                    fresh[i] = False
                    faults.add(_reason(block[i], error))
            if fresh.any():
                self._new.append(stamps[fresh])
            blocks.append(stamps["digest"])
        faults.check("Repair them or take them out of the data.")
        return np.concatenate(blocks)

    def keep(self) -> None:
        """Write what is new to the file.

        Raises:
            ArtifactError: It cannot be written.
        """
        if not self._new or self.file is None or self.file.is_symlink():
            return
        import numpy as np

        table = np.concatenate([*self._new, self._table])
        _, first = np.unique(table["stamp"], return_index=True)  # sorted, the newest of equals
        self._known, self._new = table[first], []
        with writing.replacing(self.file) as temporary, temporary.open("wb") as stream:
            seal = np.array([(_SEAL, _SEAL, _checksum(self._known.tobytes()))], _FIELDS)
            np.save(stream, np.concatenate([self._known, seal]), allow_pickle=False)

    def renew(self) -> None:
        """Read every file again; what was remembered is replaced."""
        import numpy as np

        self._known, self._new = np.zeros(0, _FIELDS), []

    @property
    def _table(self) -> np.ndarray[Any, Any]:
        import numpy as np

        if self._known is None:
            self._known = np.zeros(0, _FIELDS)
            if self.file is not None and (found := _load(self.file)) is not None:
                self._known = found
        return self._known

    def _recall(self, stamps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Fill in the digests that are known; which ones are."""
        import numpy as np

        table = self._table
        if not len(table):
            return np.zeros(len(stamps), bool)
        place = np.searchsorted(table["stamp"], stamps["stamp"]).clip(max=len(table) - 1)
        found: np.ndarray[Any, Any] = (table["stamp"][place] == stamps["stamp"]) & (
            table["check"][place] == stamps["check"]
        )
        stamps["digest"][found] = table["digest"][place[found]]
        return found


def _load(file: Path) -> np.ndarray[Any, Any] | None:
    """The table in a file; ``None`` where the file is anything but a whole table: its files are then read again.

    Nothing that the file says of itself is believed: its size gives the number of rows, the rows give the header, and
    the last row holds the checksum of the others.
    """
    import numpy as np

    row = np.dtype(_FIELDS).itemsize
    try:
        if file.is_symlink() or not file.is_file():
            return None
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = len(_header(0))
            rows, rest = divmod(size - start, row)
            if rows < 1 or rest or stream.read(start) != _header(rows):
                return None
            content = stream.read(rows * row)
    except OSError:
        return None
    if len(content) != rows * row:
        return None
    table = np.frombuffer(content, _FIELDS)
    last = table[-1]
    sealed = last["stamp"] == last["check"] == _SEAL and bytes(last["digest"]) == bytes(_checksum(content[:-row]))
    return table[:-1] if sealed else None


def _header(rows: int) -> bytes:
    """The bytes before a table of so many rows in an .npy file."""
    import numpy as np

    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(_FIELDS)), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _checksum(rows: bytes) -> tuple[int, ...]:
    return tuple(hashlib.sha256(rows).digest())


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - called for every image: a Path each costs more than the rest
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is no regular file")
    text = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
    mark = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()
    return int.from_bytes(mark[:8], "little"), int.from_bytes(mark[8:], "little")


def _read(path: str, inspect: Inspect | None) -> bytes:
    if inspect is None:
        return bytes.fromhex(artifacts.file_digest(Path(path)))
    content = Path(path).read_bytes()
    inspect(path, content)
    return hashlib.sha256(content).digest()


def _reason(path: str, error: OSError | DataError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is not there"
    return error.message if isinstance(error, DataError) else f"{path} cannot be read: {error.strerror}"
