"""The check of a checkpoint against the data, before anything is run."""

from __future__ import annotations

import dataclasses

import typer

from megu_cli.cli.commands.shared import display, opened
from megu_cli.cli.console import say
from megu_cli.cli.options import Options


def check(options: Options) -> None:
    """Check that the checkpoint classifies the data; if not, name the cause and what to write into the config.

    It tries other sizes, normalisations, orders of channels and orders of classes. Exit code 2 if something is wrong.
    Example: megu check -c megu.yaml
    """
    from megu_cli.errors import ConfigError
    from megu_cli.pipeline import checks

    with opened(options, write=False) as (pipeline, _):
        context = pipeline.context
        if not context.inputs.original.path.exists():
            raise ConfigError(
                "there is no checkpoint to check",
                "Set model.checkpoint to your trained weights, or train them with `megu train`.",
            )
        found = checks.preflight(context)
    if options.json or not found.fault:
        display(options, dataclasses.asdict(found), lambda r: say(f"{r['line']}: nothing to change"))
    if found.fault:
        if options.json:
            raise typer.Exit(2)
        raise found.fault
