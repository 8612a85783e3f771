"""The Typer app, and the only place where an exception becomes an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from megu_cli import entry
from megu_cli.cli import commands
from megu_cli.cli.console import say
from megu_cli.errors import NO_SPACE, MeguError
from megu_cli.execution.processes import rank, world
from megu_cli.text import printable

_UsageError: Any = typer.BadParameter.__base__
# Seconds that another process waits for the first to find the same fault.
_PATIENCE = 60.0


class _Commands(TyperGroup):
    """The commands; what the command line's own errors quote of it is shown escaped."""

    def make_context(self, *given: Any, **settings: Any) -> Any:
        """Parse megu's own part of the command line."""
        with _escaped():
            return super().make_context(*given, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Parse a command's part, and call it."""
        with _escaped():
            return super().invoke(ctx)


@contextlib.contextmanager
def _escaped() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


app = typer.Typer(
    name="megu",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained image classifier forget: a class, a sub-class, or single images, without retraining.\n\n"
    "Start with [bold]megu demo[/bold], or [bold]megu init[/bold] for your own model and data.",
    epilog="Exit codes: 0 done; 2 bad usage, config, data or checkpoint; 3 a requirement is not met, "
    "or a record does not hold; 4 the MLLM backend failed; 1 anything else; 130 interrupted by Ctrl-C, 143 by SIGTERM.",
)
commands.register(app)


def script() -> NoReturn:
    """`main`, and the end of this process."""
    try:
        main()
    except SystemExit as ended:
        leave(ended.code)
    leave(0)


def leave(code: str | int | None) -> NoReturn:
    """End this process, as ``sys.exit`` does for one.

    One of several does not wait for the interpreter to be taken apart: a thread of torch's gloo may then still hold
    tensors of the last exchange, and aborts the process when it lets go of them (pytorch/pytorch#190489).
    Nor does an interrupted one, for which that may take longer than its user waits.
    """
    if entry.interrupted():
        # Whatever became of KeyboardInterrupt on its way.
        entry.say()
        code = entry.interrupted()
    elif world() == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: Always, with the exit code.
    """
    # Read here, since what fails may fail before the options are parsed; -qv is -q -v.
    verbose = any(argument == "--verbose" or re.fullmatch(r"-\w*v\w*", argument) for argument in sys.argv[1:])
    try:
        app()
    except SystemExit:
        # CPython remembers an interrupt that passed through exec(), as imports call it, and `python -m` then dies of
        # SIGINT, though Typer has made an exit of it. The next exec() forgets it.
        exec("")
        raise
    except MeguError as error:
        if verbose:
            say(traceback.format_exc(), err=True)
        if rank() > 0:
            _wait_for_the_first(error)
        _report(error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a shell pipeline has gone: nothing more to say, and nowhere to say it.
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        # What is written as a whole says so itself; here it is a temporary file, a cache or the output.
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            where = f" while writing {error.filename}" if error.filename else ""
            _report(f"no space left{where}; nothing was lost", "Make room, and run it again.")
            sys.exit(2)
        if entry.interrupted():
            sys.exit(entry.interrupted())
        if verbose:
            say(traceback.format_exc(), err=True)
        _report(f"{type(error).__name__}: {error}", "This is a bug, or a limit of this machine; -v shows where.")
        sys.exit(1)


def _wait_for_the_first(error: MeguError) -> None:
    """Let the first process say what all of them found.

    The launcher ends all processes when one fails: whoever finds a fault before the first process does would cut it
    short. Once the first has said it and left, the launcher's signal ends this one, with the same exit code. Where no
    signal comes, the fault is this process's own.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(error.exit_code))
    time.sleep(_PATIENCE)


def _report(message: str, hint: str) -> None:
    from rich.text import Text

    from megu_cli.cli.console import SafeConsole

    console = SafeConsole(stderr=True, soft_wrap=True, highlight=False)
    # A name with a line break begins no line of its own: it could pass for another message.
    message, hint = (re.sub(r"\n(?! )", "\n  ", text) for text in (message, hint))
    console.print(Text("error: ", style="bold red") + Text(message))
    if hint:
        console.print(Text(hint, style="dim"))
