"""Files that are whole or absent, and the lock of a run directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megu_cli.errors import NO_SPACE, ArtifactError, ForeignFileError
from megu_cli.run import files

_TEMPORARY = ".megu-tmp-"
# Folders that megu writes in a run directory.
_FOLDERS = (files.UNLEARNED, files.COMPARE_FOLDER)


def linked(path: Path) -> ForeignFileError:
    """What is said where a symbolic link stands in the place of a file to be written."""
    return ForeignFileError(
        f"{path} is a symbolic link, and megu writes through none",
        "Remove the link, or give another directory with -o.",
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place, synced to disk, when the block ends well.

    The file's mode follows the umask, whatever the writer makes of it.

    Raises:
        ArtifactError: The folder cannot be written, or ``path`` is a symbolic link.
    """
    if path.is_symlink():
        raise linked(path)
    try:
        with _temporary(path) as temporary:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode & 0o777)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> ArtifactError:
    """What is said where a file cannot be written."""
    if error.errno in NO_SPACE:
        return ArtifactError(f"no space left while writing {path}; nothing was lost", "Make room, and run it again.")
    return ArtifactError(f"{path} cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one writer of a run directory; leftovers of a killed one are swept.

    The lock file goes with the lock, and so does the directory where it was made for nothing.

    Raises:
        ArtifactError: The directory cannot be written, or another process writes to it.
    """
    import filelock

    # What fails in the body is another's fault, and is not told as the directory's.
    file = folder / files.LOCK
    lock = filelock.FileLock(file, timeout=0)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        while not _holds(lock, file):  # its last holder deleted the file between our opening and locking it
            lock.release()
            lock.acquire()
        for leftover in _leftovers(folder):
            leftover.unlink(missing_ok=True)
    except filelock.Timeout:
        raise ArtifactError(
            f"another megu process is writing to {folder}",
            "Wait for it to end, or give another directory with -o.",
        ) from None
    except OSError as error:
        lock.release()
        if error.errno in NO_SPACE:
            raise unwritable(folder, error) from None
        raise ArtifactError(
            f"the run directory {folder} cannot be written: {error.strerror or error}",
            "Give another with -o DIR.",
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)  # while it is held: whoever opened it before sees in `_holds` that it is gone
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _holds(lock: Any, file: Path) -> bool:
    """True if the file that is locked is still the one in the directory."""
    try:
        own, there = os.fstat(lock._context.lock_file_fd), file.stat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _leftovers(folder: Path, nested: bool = False) -> Iterator[Path]:
    """Temporary files in a run directory and where megu writes below it, but not in a run directory of its own."""
    if nested and (folder / files.LOCK).exists():
        return
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if nested or path.name in _FOLDERS:
                yield from _leftovers(path, nested=True)
        elif path.name.startswith(_TEMPORARY):
            yield path
