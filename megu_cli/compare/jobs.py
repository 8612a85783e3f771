"""Cells of a comparison side by side: which one is computed next, and what happens when its worker dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megu_cli.compare.arena import Say
from megu_cli.compare.cells import Cells
from megu_cli.errors import MeguError
from megu_cli.execution.runtime import Track

# A cell whose worker died is taken up again so often.
_DEATHS = 3

# Makes the same cells in another process; it is pickled.
Opened = Callable[[Say], Cells]


@dataclass(frozen=True)
class Ended:
    """A cell that its worker no longer computes.

    Attributes:
        cell: Id of the cell.
        failure: Why the cell failed; empty: it did not.
        error: Error of a cell that others need.
        death: How the worker ended without a result, in words; empty: it did not.
    """

    cell: str
    failure: str = ""
    error: Exception | None = None
    death: str = ""


class Workers(Protocol):
    """Processes that compute cells and leave the results in the run directory.

    Attributes:
        advice: What to do when workers die again and again.
    """

    advice: str

    def start(self, ready: Sequence[str], failures: Mapping[str, str]) -> Sequence[str]:
        """Begin as many of these cells as there are workers for, and return them.

        Args:
            ready: Cells whose needs are done.
            failures: Cell -> why it failed, so far.
        """

    def ended(self) -> Sequence[Ended]:
        """Wait until something happens, and return the cells that ended; there may be none."""

    def close(self) -> None:
        """End all workers."""


class Jobs:
    """Computes cells by workers, each cell after those that it needs.

    Args:
        cells: The cells. What fails is in its ``failures`` afterwards.
        workers: They compute the cells, and are closed at the end.
        say: Called with a line for each cell that is taken up again.
    """

    def __init__(self, cells: Cells, workers: Workers, say: Say) -> None:
        self.cells, self.workers, self.say = cells, workers, say
        self._waiting = list(cells)
        self._done: set[str] = set()
        self._deaths = Counter[str]()

    def run(self, track: Track) -> None:
        """Compute all cells.

        Args:
            track: Reports how many cells are done.

        Raises:
            Exception: A cell that others need failed. All workers are ended.
        """
        try:
            with track("cells", len(self.cells)) as advance:
                while len(self._done) < len(self.cells):
                    ready = [name for name in self._waiting if self._done.issuperset(self.cells[name].needs)]
                    for name in self.workers.start(ready, self.cells.failures):
                        self._waiting.remove(name)
                    for ended in self.workers.ended():
                        if self._is_done(ended):
                            self._done.add(ended.cell)
                            advance()
        finally:
            self.workers.close()

    def _is_done(self, ended: Ended) -> bool:
        """Note the end of a cell; return false if it is to be taken up again.

        Raises:
            Exception: Other cells need this one, and it failed.
        """
        name = ended.cell
        if ended.error:
            raise ended.error
        if ended.failure:
            self.cells.failures[name] = ended.failure
        if not ended.death:
            return True
        self._deaths[name] += 1
        if self._deaths[name] <= _DEATHS:
            self.say(f"{name}: {ended.death}; another one takes it up")
            self._waiting.insert(0, name)
            return False
        death = f"{ended.death} {self._deaths[name]} times"
        if self.cells[name].common:
            raise MeguError(f"{name}: {death}", self.workers.advice)
        self.cells.failures[name] = f"{death}. {self.workers.advice}"
        return True


def computed(cells: Cells, name: str, failures: Mapping[str, str], force: bool) -> Ended:
    """Compute a cell, in a worker.

    Args:
        cells: The cells, as opened in the worker.
        name: Id of the cell.
        failures: Cell -> why it failed, so far.
        force: Compute again what is there.
    """
    cells.failures.update(failures)
    try:
        cells.result(name, force)
    except Exception as error:
        return Ended(name, error=cells.named(name, error))
    return Ended(name, cells.failures.get(name, ""))
