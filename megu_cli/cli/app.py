"""The Typer app, and the only place where an exception becomes an exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback

import typer

from megu_cli.cli import commands
from megu_cli.errors import MeguError
from megu_cli.processes import leave, rank

# Seconds that another process waits for the first to find the same fault.
_PATIENCE = 60.0

app = typer.Typer(
    name="megu",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained image classifier forget: a class, a sub-class, or single images, without retraining.\n\n"
    "Start with [bold]megu demo[/bold], or [bold]megu init[/bold] for your own model and data.",
    epilog="Exit codes: 0 done; 2 bad usage, config, data or checkpoint; 3 a requirement is not met; "
    "4 the MLLM backend failed; 1 anything else; 130 interrupted.",
)
commands.register(app)


def main() -> None:
    """Run the command line; called by the ``megu`` script."""
    # Read here, since what fails may fail before the options are parsed; -qv is -q -v.
    verbose = any(argument == "--verbose" or re.fullmatch(r"-\w*v\w*", argument) for argument in sys.argv[1:])
    try:
        app()
    except SystemExit as exit:
        # CPython remembers an interrupt that passed through exec(), as imports call it, and `python -m` then dies of
        # SIGINT, though Typer has made an exit of it. The next exec() forgets it.
        exec("")
        leave(exit.code)
    except MeguError as error:
        if verbose:
            traceback.print_exc()
        if rank() > 0:
            _wait_for_the_first(error)
        _report(error.message, error.hint)
        leave(error.exit_code)
    except BrokenPipeError:
        # The reader of a shell pipeline has gone: nothing more to say, and nowhere to say it.
        sys.stderr.close()
        leave(1)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        _report(f"{type(error).__name__}: {error}", "This is a bug, or a limit of this machine; -v shows where.")
        leave(1)


def _wait_for_the_first(error: MeguError) -> None:
    """Let the first process say what all of them found.

    The launcher ends all processes when one fails: whoever finds a fault before the first process does would cut it
    short. Once the first has said it and left, the launcher's signal ends this one, with the same exit code. Where no
    signal comes, the fault is this process's own.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(error.exit_code))
    time.sleep(_PATIENCE)


def _report(message: str, hint: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="bold red") + Text(message))
    if hint:
        console.print(Text(hint, style="dim"))
