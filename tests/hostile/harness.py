"""Runs the command line in this process on one hostile input, and checks what must hold whatever the input is."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from megu_cli.run import files

# Cases of each kind. The full run has 2,000.
CASES = int(os.environ.get("MEGU_FUZZ_CASES", "200"))
EXIT_CODES = {0, 2, 3, 4, 130, 143}
SECONDS = 60.0  # until a case counts as hanging: other programs may share the cores
COMPUTED = 15.0  # of which this process may compute
MEMORY = 1 << 20  # KiB by which the peak of this process may grow in one case: 1 GiB

_PROGRAMS = {"subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
_CACHES = (files.FILE_DIGESTS, files.INPUT_DIGESTS)  # commands that write nothing else may renew them


class Overdue(BaseException):
    """A case took longer than `SECONDS`. No `except Exception` of the program catches it."""


@dataclass
class _Watch:
    """What the interpreter reports while a case runs."""

    active: bool = False
    programs: list[str] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _PROGRAMS:
            self.programs.append(f"{event} {arguments[:2]!r}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.add(os.fsdecode(arguments[0]))
        elif event in _CHANGES:
            self.removed.add(str(arguments[0]))


_watch = _Watch()
sys.addaudithook(_watch)


@dataclass(frozen=True)
class Answer:
    """What one call of the command line said and did."""

    code: int
    out: str
    err: str
    opened: frozenset[str]


def fuzz(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on `CASES` generated inputs, the same ones each time."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        configured = settings(
            max_examples=CASES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        )
        return configured(given(**strategies)(test))

    return decorate


def call(*arguments: object, user: Path, run: Path, writes: bool = False) -> Answer:
    """Call ``megu`` with these arguments and check the property of every case.

    Args:
        arguments: The command line.
        user: Folder of the user's files. None may change.
        run: Run directory. It may lie in ``user``, and may change only where ``writes`` is true.
        writes: The command writes artifacts.
    """
    from megu_cli.cli.app import main

    before = _contents(user, run, writes)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["megu", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code: Any = 0
    try:
        with watched() as seen, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    answer = Answer(code, out.getvalue(), err.getvalue(), frozenset(seen.opened))
    told = f"megu {' '.join(map(str, arguments))}: exit {code}\n{answer.err[-2000:]}"
    listed = arguments[0] == "status" and code == 1 and "error: " not in answer.err  # documented: not all is fresh
    assert code in EXIT_CODES or listed, told
    assert "Traceback" not in answer.err and "This is a bug" not in answer.err, told
    errors = len(re.findall(r"^error: ", answer.err, re.MULTILINE))
    assert errors == (code not in (0, 130, 143) and not listed), f"{errors} messages: {told}"
    assert not seen.programs, f"started {seen.programs}: {told}"
    if "--json" not in arguments:
        raw = {c for c in answer.out + answer.err if unicodedata.category(c) == "Cc" and c not in "\n\t"}
        assert not raw, f"control characters {raw!r} reach the terminal: {told}"
    changed = {name for name, content in _contents(user, run, writes).items() ^ before.items()}
    assert not changed, f"changed {sorted(changed)}: {told}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < MEMORY, f"took {grown >> 10} MiB: {told}"
    return answer


@contextlib.contextmanager
def watched() -> Iterator[_Watch]:
    """Record programs that are started, and files that are opened, in this block."""
    _watch.programs, _watch.opened, _watch.removed = [], set(), set()
    _watch.active = True
    try:
        yield _watch
    finally:
        _watch.active = False


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Overdue` if the block takes too long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Overdue(f"no end after {seconds:g} seconds")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    started, computed = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    # The program may have caught what was raised.
    assert time.monotonic() - started < seconds, f"no end after {seconds:g} seconds"
    computed = time.process_time() - computed
    assert computed < COMPUTED, f"computed for {computed:.0f} seconds"


@contextlib.contextmanager
def expected_errors() -> Iterator[None]:
    """Call an inner function directly: it ends well or raises a `MeguError`, in time, and starts no program."""
    from megu_cli.errors import MeguError

    with watched() as seen, limited(), contextlib.suppress(MeguError):
        yield
    assert not seen.programs, seen.programs


def fresh(run: Path, like: Path | None = None) -> None:
    """Make the run directory a copy of another one, or nothing at all."""
    shutil.rmtree(run, ignore_errors=True)
    if like is not None:
        shutil.copytree(like, run)


def _contents(user: Path, run: Path, writes: bool) -> dict[str, str]:
    """Digest of each of the user's files, and of the run directory's unless the command writes to it."""
    found = {}
    for folder, _, names in os.walk(user):
        inside = Path(folder).is_relative_to(run)
        if inside and writes:
            continue
        for name in names:
            path = Path(folder) / name
            if inside and name in _CACHES:
                continue
            if path.is_symlink():
                found[str(path)] = f"link to {os.readlink(path)}"  # noqa: PTH115
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
