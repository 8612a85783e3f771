"""Workers of a comparison that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megu_cli.compare.arena import Arena, Say
from megu_cli.compare.cells import Cells
from megu_cli.compare.jobs import Ended, Opened, computed
from megu_cli.execution.runtime import available_cores

_THREADS = "OMP_NUM_THREADS"


@dataclass
class _Worker:
    """A process that computes one cell after the other.

    Attributes:
        cell: The one at hand; empty: none.
        arena: The seed whose models it has loaded.
    """

    process: BaseProcess
    connection: Connection[Any, Any]
    cell: str = ""
    arena: Arena | None = None


class LocalWorkers:
    """Processes that each compute one cell after the other. See `Workers`.

    Args:
        cells: The cells.
        opened: Makes the same cells in another process.
        say: Called with the lines of the processes.
        force: Compute again what is there.
        number: How many processes. They share the cores, unless ``OMP_NUM_THREADS`` gives each its threads.
    """

    advice = "If memory is short, give fewer --jobs."

    def __init__(self, cells: Cells, opened: Opened, say: Say, force: bool, *, number: int) -> None:
        self.cells, self.opened, self.number, self.say, self.force = cells, opened, number, say, force
        self.threads = max(1, available_cores() // number)
        self._workers: list[_Worker] = []

    def start(self, ready: Sequence[str], failures: Mapping[str, str]) -> list[str]:
        """Give each idle process a cell, and start processes up to the number. See `Workers.start`."""
        begun: list[str] = []
        while left := [name for name in ready if name not in begun]:
            worker = next((worker for worker in self._workers if not worker.cell), None)
            if worker is None and len(self._workers) == self.number:
                break
            worker = worker or self._new()
            name = min(left, key=partial(self._rank, worker))
            try:
                worker.connection.send((name, dict(failures)))
            except OSError:  # killed while it was idle; `_received` sees it
                break
            worker.cell, worker.arena = name, self.cells[name].arena or worker.arena
            begun.append(name)
        return begun

    def ended(self) -> list[Ended]:
        """See `Workers.ended`."""
        ready = wait([worker.connection for worker in self._workers])
        found = [self._received(worker) for worker in list(self._workers) if worker.connection in ready]
        return [ended for ended in found if ended]

    def close(self) -> None:
        """See `Workers.close`."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def _rank(self, worker: _Worker, name: str) -> int:
        """What others need comes first, then the seed whose models a process has loaded, then one that none has."""
        cell = self.cells[name]
        if cell.common:
            return 0
        if cell.arena is worker.arena:
            return 1
        return 2 + any(cell.arena is other.arena for other in self._workers)

    def _new(self) -> _Worker:
        # Not forked: threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.opened, self.threads, self.force))
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _received(self, worker: _Worker) -> Ended | None:
        """Take in what a process says: a line, or the end of its cell."""
        try:
            said: str | Ended = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            death = f"its process was ended from outside (exit code {worker.process.exitcode})"
            return Ended(worker.cell, death=death) if worker.cell else None
        if isinstance(said, str):
            self.say(said)
            return None
        worker.cell = ""
        return said


def _work(connection: Connection[Any, Any], opened: Opened, threads: int, force: bool) -> None:
    """Compute the cells that the connection names, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process then ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    os.environ.setdefault(_THREADS, str(threads))  # before any library is loaded that reads it

    def say(line: str) -> None:
        if not line.endswith(": fresh"):
            connection.send(line)

    cells: Cells | None = None
    while True:
        try:
            name, failures = connection.recv()
        except EOFError:
            return
        cells = cells or opened(say)
        connection.send(computed(cells, name, failures, force))


def _end_with_the_first() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
