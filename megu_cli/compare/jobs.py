"""Cells of a comparison side by side, in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megu_cli.compare.arena import Arena, Say
from megu_cli.compare.cells import Cells
from megu_cli.errors import MeguError
from megu_cli.execution.runtime import Track

# A cell whose process was killed is taken up again so often.
_KILLS = 3
_THREADS = "OMP_NUM_THREADS"

Opened = Callable[[Say], Cells]


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


class Jobs:
    """Computes cells in several processes; each leaves its results in the run directory.

    Args:
        cells: The cells. What fails is in its ``failures`` afterwards.
        opened: Makes the same cells in another process. It is pickled.
        number: How many processes. They share the cores, unless ``OMP_NUM_THREADS`` gives each its threads.
        say: Told in a line what is done.
        force: Compute again what is there.
    """

    def __init__(self, cells: Cells, opened: Opened, number: int, say: Say, force: bool = False) -> None:
        self.cells, self.opened, self.number, self.say, self.force = cells, opened, number, say, force
        self.threads = max(1, _cores() // number)
        self._workers: list[_Worker] = []
        self._waiting = list(cells)
        self._done: set[str] = set()
        self._kills = Counter[str]()

    def run(self, track: Track) -> None:
        """Compute all cells, each after those that it needs.

        Args:
            track: Reports how many cells are done.

        Raises:
            Exception: A cell that others need failed. All processes are ended.
        """
        with track("cells", len(self.cells)) as advance:
            try:
                while len(self._done) < len(self.cells):
                    self._assign()
                    ready = wait([worker.connection for worker in self._workers])
                    for worker in [worker for worker in self._workers if worker.connection in ready]:
                        if finished := self._receive(worker):
                            self._done.add(finished)
                            advance()
            finally:
                for worker in self._workers:
                    worker.process.terminate()
                for worker in self._workers:
                    worker.process.join()

    def _assign(self) -> None:
        """Give each idle process a cell whose needs are done, and start processes up to the number."""
        while ready := [name for name in self._waiting if self._done.issuperset(self.cells[name].needs)]:
            worker = next((worker for worker in self._workers if not worker.cell), None)
            if worker is None and len(self._workers) == self.number:
                return
            worker = worker or self._start()
            name = min(ready, key=partial(self._rank, worker))
            try:
                worker.connection.send((name, self.cells.failures))
            except OSError:  # killed while it was idle; `_receive` sees it
                return
            worker.cell, worker.arena = name, self.cells[name].arena or worker.arena
            self._waiting.remove(name)

    def _rank(self, worker: _Worker, name: str) -> int:
        """What others need comes first, then the seed whose models a process has loaded, then one that none has."""
        cell = self.cells[name]
        if cell.common:
            return 0
        if cell.arena is worker.arena:
            return 1
        return 2 + any(cell.arena is other.arena for other in self._workers)

    def _start(self) -> _Worker:
        # Not forked: threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.opened, self.threads, self.force))
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _receive(self, worker: _Worker) -> str:
        """Take in what a process says; return the cell that is done with it, or an empty text.

        Raises:
            Exception: What a cell raised that others need.
        """
        name = worker.cell
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            return self._killed(worker)
        if kind == "said":
            self.say(content)
            return ""
        worker.cell = ""
        if kind == "raised":
            raise content
        if content:
            self.cells.failures[name] = content
        return name

    def _killed(self, worker: _Worker) -> str:
        worker.process.join()
        self._workers.remove(worker)
        if not (name := worker.cell):
            return ""
        self._kills[name] += 1
        what = f"its process was ended from outside (exit code {worker.process.exitcode})"
        if self._kills[name] <= _KILLS:
            self.say(f"{name}: {what}; another one takes it up")
            self._waiting.insert(0, name)
            return ""
        what = f"{what} {self._kills[name]} times"
        if self.cells[name].common:
            raise MeguError(f"{name}: {what}", "If memory is short, give fewer --jobs.")
        self.cells.failures[name] = f"{what}; if memory is short, give fewer --jobs"
        return name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(connection: Connection[Any, Any], opened: Opened, threads: int, force: bool) -> None:
    """Compute the cells that the connection names, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process then ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    os.environ.setdefault(_THREADS, str(threads))  # before any library is loaded that reads it

    def say(line: str) -> None:
        if not line.endswith(": fresh"):
            connection.send(("said", line))

    cells: Cells | None = None
    while True:
        try:
            name, failures = connection.recv()
        except EOFError:
            return
        cells = cells or opened(say)
        cells.failures.update(failures)
        try:
            cells.result(name, force)
            answer: tuple[str, Any] = ("done", cells.failures.get(name, ""))
        except Exception as error:
            answer = ("raised", cells.named(name, error))
        connection.send(answer)


def _end_with_the_first() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
