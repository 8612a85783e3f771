"""The comparison with other methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Optional

import typer

from megu_cli.cli.commands.shared import display, opened, rows_of
from megu_cli.cli.options import Options


def compare(
    options: Options,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B,...", help="Methods, by name; without it all there are. [dim]compare.methods[/dim]"),
    ] = None,
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Seeds, counted up from --seed. [dim]compare.seeds[/dim]"),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose every method's settings from an equally small grid first.")
    ] = False,
) -> None:
    """Set MeGU beside retraining and other methods: same data, same original, same oracle, several seeds.

    Example: megu compare --methods megu,neggrad_plus,delete,mask --seeds 3
    """
    from megu_cli.cli import tables
    from megu_cli.compare import Comparison
    from megu_cli.config import changed
    from megu_cli.errors import MeguError

    with opened(options) as (pipeline, config):
        given = {"methods": [name.strip() for name in methods.split(",")] if methods else None, "seeds": seeds}
        settings = {f"compare.{key}": value for key, value in given.items() if value is not None}
        work = replace(pipeline.work, config=changed(config, settings))
        comparison = Comparison(work, pipeline.say)
        comparison.refuse_foreign(tune, options.force)
        if options.dry_run:
            display(options, {"plan": rows_of(comparison.plan(tune))}, tables.plan)
            return
        result = comparison.run(tune, options.force)
    display(options, result, tables.comparison)
    if result["failed"]:
        told = "; ".join(f"{name} ({next(iter(seeds.values()))})" for name, seeds in result["failed"].items())
        raise MeguError(f"failed: {told}", "The others' results stand; the same command tries the failed ones again.")
