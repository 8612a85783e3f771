"""The commands: each opens a run, asks the pipeline for its stages, and shows what came of it."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from megu_cli.cli.commands.check import check
from megu_cli.cli.commands.compare import compare
from megu_cli.cli.commands.config import schema, validate
from megu_cli.cli.commands.diff import diff
from megu_cli.cli.commands.finish import purge, report
from megu_cli.cli.commands.ledger import group as ledger_group
from megu_cli.cli.commands.proof import check_data, record, verify
from megu_cli.cli.commands.runs import run, status
from megu_cli.cli.commands.stages import evaluate, finetune, labels, noise, similarity, train
from megu_cli.cli.commands.start import demo, init
from megu_cli.cli.console import say
from megu_cli.cli.options import command, possible


def register(app: typer.Typer) -> None:
    """Add all commands to the app."""
    app.command(rich_help_panel="Start here")(possible(demo))
    app.command(rich_help_panel="Start here")(command(init))
    app.command(rich_help_panel="Start here")(possible(validate))
    app.command(rich_help_panel="Start here")(command(check))
    app.command(rich_help_panel="Start here")(schema)
    app.command(rich_help_panel="The whole pipeline")(command(run))
    app.command(rich_help_panel="The whole pipeline")(command(status))
    app.command(rich_help_panel="The whole pipeline")(command(compare))
    for stage in (train, similarity, labels, noise, finetune, evaluate):
        name = "eval" if stage is evaluate else stage.__name__
        app.command(name, rich_help_panel="One stage at a time")(command(stage))
    app.command(rich_help_panel="Once it is done")(command(report))
    app.command(rich_help_panel="Once it is done")(possible(diff))
    app.command(rich_help_panel="Once it is done")(command(purge))
    app.command(rich_help_panel="Proof")(command(record))
    app.command(rich_help_panel="Proof")(command(verify))
    app.command("check-data", rich_help_panel="Proof")(command(check_data))
    app.add_typer(ledger_group(), name="ledger", rich_help_panel="Proof")
    app.command("help", hidden=True)(help_)
    app.callback(invoke_without_command=True)(_root)


def help_(
    context: typer.Context,
    name: Annotated[Optional[str], typer.Argument(metavar="[COMMAND]")] = None,  # noqa: UP045
) -> None:
    """Show the help of megu, or of a command."""
    from megu_cli.errors import ConfigError

    above: Any = context.parent
    if name is None:
        typer.echo(above.get_help())
        return
    found = above.command.get_command(above, name)
    if found is None:
        raise ConfigError(f"there is no command {name!r}", "`megu help` lists them.")
    typer.echo(found.make_context(name, [], parent=above, resilient_parsing=True).get_help())


def _version(show: bool) -> None:
    if show:
        from megu_cli import __version__

        say(f"megu {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
