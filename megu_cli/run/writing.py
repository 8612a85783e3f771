"""Files that are whole or absent, and the lock of a run directory."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
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
    # Processes of several machines may write here, so that a process id does not tell them apart.
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def temporary_folder(parent: Path) -> Path:
    """Path of a new folder for temporary files.

    Processes that outlive its maker may need the folder: only a lock for one writer sweeps it.
    """
    return parent / f"{_TEMPORARY}{secrets.token_hex(4)}"


@contextlib.contextmanager
def locked(folder: Path, together: bool = False) -> Iterator[None]:
    """Be the one writer of a run directory, or one of several; leftovers of a killed one are swept.

    The lock file goes with the lock, and so does the directory where it was made for nothing.

    Args:
        folder: The run directory.
        together: Let other processes in that ask for the same. The last one to leave sweeps temporary files, and leaves
            temporary folders.

    Raises:
        ArtifactError: The directory cannot be written, or another process writes to it.
    """
    import filelock

    # What fails in the body is another's fault, and is not told as the directory's.
    file = folder / files.LOCK
    lock = _TogetherLock(file) if together else filelock.FileLock(file, timeout=0)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, file)
        if not together:
            _sweep(folder)
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
            if isinstance(lock, _TogetherLock):
                lock.last(lambda: _sweep(folder, folders=False))
            else:
                file.unlink(missing_ok=True)  # while it is held: who opened it before sees in `_holds` that it is gone
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def turn(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file; while another process holds it, wait. A file that a killed process left does not count.

    Args:
        file: The lock file, which goes with the lock.
        waiting: Called once if there is something to wait for.

    Raises:
        ArtifactError: The file cannot be written.
    """
    import filelock

    lock = filelock.FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _acquire(lock, file)
        except filelock.Timeout:
            waiting()
            _acquire(lock, file, timeout=-1, poll_interval=0.2)
    except OSError as error:
        lock.release()
        raise unwritable(file, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()


class _TogetherLock:
    """A lock that processes hold together, on the file that filelock locks for one alone: each keeps the other out.

    Args:
        file: The lock file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.descriptor: int | None = None

    def acquire(self) -> None:
        import fcntl

        import filelock

        self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise filelock.Timeout(str(self.file)) from None

    def last(self, tidy: Callable[[], None]) -> None:
        """If no other process holds the lock any more, tidy up and delete the file."""
        import fcntl

        assert self.descriptor is not None
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tidy()
        self.file.unlink(missing_ok=True)

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _acquire(lock: Any, file: Path, **how: float) -> None:
    """Lock a file, and again if its last holder deleted it between our opening and locking it."""
    lock.acquire(**how)
    while not _holds(lock, file):
        lock.release()
        lock.acquire(**how)


def _holds(lock: Any, file: Path) -> bool:
    """True if the file that is locked is still the one in the directory."""
    descriptor: Any = lock.descriptor if isinstance(lock, _TogetherLock) else lock._context.lock_file_fd
    try:
        own, there = os.fstat(descriptor), file.stat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _sweep(folder: Path, folders: bool = True) -> None:
    for leftover in _leftovers(folder):
        if leftover.is_dir() and not leftover.is_symlink():
            if folders:
                shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _leftovers(folder: Path, nested: bool = False) -> Iterator[Path]:
    """Temporary files and folders where megu writes in a run directory, but not in a run directory below it."""
    if nested and (folder / files.LOCK).exists():
        return
    for path in list(folder.iterdir()):
        if path.name.startswith(_TEMPORARY):
            yield path
        elif path.is_dir() and not path.is_symlink() and (nested or path.name in _FOLDERS):
            yield from _leftovers(path, nested=True)
