"""The cells of a comparison: the pieces that a process computes by itself, each under a lock of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megu_cli.compare.arena import Arena, Say
from megu_cli.errors import MeguError
from megu_cli.run import files, ownership, writing
from megu_cli.run.artifacts import Artifact


@dataclass(frozen=True)
class Cell:
    """A piece of a comparison that one process computes by itself.

    Attributes:
        id: Its place below ``compare/``, such as ``0/megu``.
        compute: Returns the result. It reads a result that is there and fits, unless its argument is true.
        needs: Ids of the cells that are computed before it.
        arena: The arena whose loaded models it uses.
        common: True if other cells need the result: its failure is the failure of the comparison.
    """

    id: str
    compute: Callable[[bool], Artifact | None]
    needs: tuple[str, ...] = ()
    arena: Arena | None = None
    common: bool = False


class Cells(Mapping[str, Cell]):
    """The cells of a comparison, in an order in which each cell stands below those that it needs.

    Several processes, on several machines that share the run directory, may compute them at the same time.

    Args:
        out: The run directory.
        say: Called with a line for each cell that fails, or that another process computes.

    Attributes:
        failures: Cell -> why it failed. A cell that failed is not tried again.
    """

    def __init__(self, out: Path, say: Say) -> None:
        self.out, self.say = out, say
        self.failures: dict[str, str] = {}
        self._cells: dict[str, Cell] = {}
        self._results: dict[str, Artifact | None] = {}
        self._arena: Arena | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, name: str) -> Cell:
        return self._cells[name]

    def add(self, cell: Cell) -> str:
        """Add a cell below those that it needs, and return its id."""
        self._cells[cell.id] = cell
        return cell.id

    def result(self, name: str, force: bool = False) -> Artifact | None:
        """Return the result of a cell, or ``None`` if it failed or leaves its result in the run directory.

        Raises:
            Exception: A cell that others need failed.
        """
        if name not in self._results and name not in self.failures:
            try:
                self._results[name] = self.compute(name, force)
            except Exception as error:  # one method that fails must not cost the others' results
                if self[name].common:
                    raise
                self.failures[name] = self._described(name, error)
                self.say(f"{name}: FAILED: {self.failures[name]}")
        return self._results.get(name)

    def compute(self, name: str, force: bool = False) -> Artifact | None:
        """Return the result of a cell, after those that it needs; wait if another process computes one of them.

        Raises:
            Exception: Whatever the cell raises.
        """
        cell = self[name]
        for need in cell.needs:
            self.result(need)
        self._make_room(cell)
        with writing.turn(self._lock(name), lambda: self.say(f"{name}: waiting for the process that computes it")):
            return cell.compute(force)

    def _lock(self, name: str) -> Path:
        path = self.out / files.COMPARE_FOLDER / name
        return path.with_name(f".{path.name}{files.LOCK}")

    def _make_room(self, cell: Cell) -> None:
        """Free the models of the other seeds when the work moves on to another seed."""
        if cell.arena is not self._arena:
            for other in {id(c.arena): c.arena for c in self.values()}.values():
                if other not in (None, cell.arena):
                    other.forget_loaded()
            self._arena = cell.arena

    def named(self, name: str, error: Exception) -> MeguError:
        """Return the error of a cell with the cell's id in its message; the exit code stays."""
        if not isinstance(error, MeguError):
            return MeguError(f"{name}: {self._described(name, error)}")
        error.message = f"{name}: {error.message}"
        return error

    def _described(self, name: str, error: Exception) -> str:
        """Return what is said of a cell that failed; the traceback of an unexpected error goes to a file."""
        if isinstance(error, MeguError):
            return error.message
        log = f"{files.COMPARE_FOLDER}/{name.replace('/', '-')}.error.txt"
        ownership.refuse_foreign(self.out, log)
        (self.out / files.COMPARE_FOLDER).mkdir(exist_ok=True)
        with writing.replacing(self.out / log) as temporary:
            temporary.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return f"{type(error).__name__}: {error}".splitlines()[0] + f" ({log})"
