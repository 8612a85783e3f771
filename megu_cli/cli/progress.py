"""Progress on stderr: a bar in a terminal, plain lines elsewhere, nothing for what takes under two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from megu_cli.execution.runtime import Track, silent
from megu_cli.text import printable

_PATIENCE = 2.0
_INTERVAL = 10.0


def tracker(quiet: bool) -> Track:
    """The tracker for this process's stderr."""
    if quiet:
        return silent
    return _bar if sys.stderr.isatty() else _lines


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megu_cli.cli.console import SafeConsole

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=SafeConsole(stderr=True),
        transient=True,
    )
    task = progress.add_task(label, total=total, rate="")
    started = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - started
        if not progress.live.is_started and elapsed > _PATIENCE:
            progress.start()
        progress.update(task, completed=done, rate=_pace(done / max(elapsed, 1e-9)))

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


@contextlib.contextmanager
def _lines(label: str, total: int) -> Iterator[Callable[[], None]]:
    started = time.monotonic()
    said = started - _INTERVAL + _PATIENCE
    done = 0

    def advance() -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if now - said >= _INTERVAL:
            said = now
            rate = done / (now - started)
            left = (total - done) / rate
            print(f"{printable(label)}: {done}/{total}, {_pace(rate)}, {left:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201

    yield advance


def _pace(rate: float) -> str:
    """How much is done in a second, or in a minute where that is less than one."""
    return f"{rate:.0f}/s" if rate >= 1 else f"{60 * rate:.0f}/min"
