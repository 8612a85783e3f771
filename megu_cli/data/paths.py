"""Which files belong to a data set: nothing outside its root, unless links out of it are allowed."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from megu_cli.data.decode import IMAGE_SUFFIXES
from megu_cli.errors import DataError


def relative(path: str) -> str:
    """A path as it stands in a list, tidied: ``./a//b.png`` becomes ``a/b.png``.

    Raises:
        DataError: It is empty or absolute, or climbs with ``..``.
    """
    if not path or "\0" in path:
        raise DataError("the path is empty" if not path else "the path holds a NUL")
    if path.startswith(("/", "\\", "~")) or path[1:3] in (":\\", ":/"):
        raise DataError(f"{path} is absolute; paths are relative to data.root")
    if ".." in path and ".." in path.replace("\\", "/").split("/"):
        raise DataError(f"{path} climbs out with ..")
    return posixpath.normpath(path) if "." in path[:1] or "//" in path or "/." in path else path


class Root:
    """The folder that all images of a data set lie in.

    Args:
        folder: Its path; may itself be a link.
        follow: Links may lead out of it.

    Raises:
        DataError: It is no folder.
    """

    def __init__(self, folder: Path, follow: bool) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder", "Set data.root to the folder of the images.")
        self.path, self.follow = str(folder), follow
        self._real = os.path.realpath(folder)
        self._folders: dict[str, str | None] = {}

    def outside(self, name: str) -> str | None:
        """What is wrong with a relative path whose folder or file is a link to outside the root; ``None`` if it is not.

        Each folder is looked at once.
        """
        if self.follow:
            return None
        folder = posixpath.dirname(name)
        if folder not in self._folders:
            self._folders[folder] = self._leads_out(folder)
        path = f"{self.path}/{name}"
        return self._folders[folder] or (self._leads_out(name) if os.path.islink(path) else None)  # noqa: PTH114

    def _leads_out(self, name: str) -> str | None:
        real = os.path.realpath(f"{self.path}/{name}")
        if real == self._real or real.startswith(self._real.rstrip("/") + "/"):
            return None
        return f"{self.path}/{name} leads out of {self.path}, to {real}"

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders in a folder, sorted; hidden ones do not count.

        Raises:
            DataError: It cannot be read, or leads out.
        """
        return sorted(entry for entry, special in self._entries(name) if special and self._is_dir(f"{name}/{entry}"))

    def images(self, name: str, above: tuple[str, ...] = ()) -> Iterator[str]:
        """Relative paths of the image files in a folder and all below it, in order of name.

        Told by their suffix; hidden files, which begin with a dot, and whatever else lies there do not count.

        Raises:
            DataError: A folder cannot be read, a link leads out or round in a circle, or a name is not UTF-8.
        """
        real = os.path.realpath(f"{self.path}/{name}")
        if real in above:
            raise DataError(f"{self.path}/{name} is a link that leads back to a folder it lies in")
        for entry, special in sorted(self._entries(name)):
            path = f"{name}/{entry}" if name else entry
            if special and self._is_dir(path):
                yield from self.images(path, (*above, real))
            elif os.path.splitext(entry)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
                if special and (fault := self.outside(path)):
                    raise _link(fault)
                yield path

    def _entries(self, name: str) -> list[tuple[str, bool]]:
        """Names in a folder, and whether each is a folder or a link."""
        if fault := self.outside(f"{name}/x"):
            raise _link(fault)
        try:
            with os.scandir(f"{self.path}/{name}") as entries:
                found = [(e.name, e.is_symlink() or e.is_dir()) for e in entries if not e.name.startswith(".")]
        except OSError as error:
            raise DataError(f"{self.path}/{name} cannot be read: {error.strerror}") from None
        for entry, _ in found:
            try:
                entry.encode()
            except UnicodeEncodeError:
                shown = entry.encode(errors="surrogateescape").decode(errors="replace")
                raise DataError(f"{self.path}/{name}/{shown}: the name is not UTF-8", "Rename it.") from None
        return found

    def _is_dir(self, name: str) -> bool:
        return os.path.isdir(f"{self.path}/{name}")  # noqa: PTH112


def _link(fault: str) -> DataError:
    return DataError(fault, "Move the files into data.root, or set data.follow_links to true if you trust the links.")
