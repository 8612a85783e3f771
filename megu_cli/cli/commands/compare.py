"""The comparison with other methods."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from megu_cli.cli.commands.shared import display, opened, rows_of
from megu_cli.cli.options import Options

if TYPE_CHECKING:
    from megu_cli.compare.comparison import Hire


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
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            metavar="N",
            min=1,
            help="Cells (a method and a seed) that are computed side by side; with --cluster, tasks at a time at most.",
        ),
    ] = None,
    cluster: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="slurm|local",
            help="Compute each cell in a task of a cluster, e.g. --cluster slurm. Needs megu-cli\\[cluster].",
        ),
    ] = None,
    cluster_option: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="KEY=VALUE",
            help="Parameter of submitit, e.g. --cluster-option slurm_partition=gpu. Repeatable.",
        ),
    ] = None,
    list_cells: Annotated[
        bool, typer.Option("--list-cells", help="Print the ids of all cells, one a line, and compute nothing.")
    ] = False,
    cell: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="ID", help="Compute one cell and what it needs. Many such processes may run at once, anywhere."
        ),
    ] = None,
) -> None:
    """Set MeGU beside retraining and other methods: same data, same original, same oracle, several seeds.

    Example: megu compare --methods megu,delete,mask --seeds 3 --jobs 2

    On Slurm: megu compare --cluster slurm --cluster-option slurm_partition=gpu --cluster-option timeout_min=120
    """
    from megu_cli.cli import tables
    from megu_cli.compare import Comparison
    from megu_cli.config import changed
    from megu_cli.errors import ConfigError, MeguError

    if cluster_option and not cluster:
        raise ConfigError("--cluster-option is for --cluster", "Add --cluster slurm.")
    if options.dry_run and (list_cells or cell):
        raise ConfigError("--dry-run says what the whole comparison would run", "Leave out --list-cells and --cell.")
    options = options.having("method", "megu")  # its rows are MeGU and others, whatever made the run's own result
    with opened(options, write=not list_cells, together=True) as (pipeline, config):
        given = {"methods": [name.strip() for name in methods.split(",")] if methods else None, "seeds": seeds}
        settings = {f"compare.{key}": value for key, value in given.items() if value is not None}
        context = replace(pipeline.context, config=changed(config, settings))
        comparison = Comparison(context, pipeline.say)
        if list_cells:
            cells = [{"id": c.id, "needs": list(c.needs)} for c in comparison.cells(tune).values()]
            display(options, {"cells": cells}, lambda result: typer.echo("\n".join(c["id"] for c in result["cells"])))
            return
        comparison.refuse_foreign(tune, options.force)
        if options.dry_run:
            display(options, {"plan": rows_of(comparison.plan(tune))}, tables.plan)
            return
        if cell:
            comparison.run_cell(cell, tune, options.force)
            display(options, {"cell": cell}, lambda result: typer.echo(f"{result['cell']}: done"))
            return
        result = comparison.run(tune, options.force, _workers(jobs, cluster, cluster_option or []))
    display(options, result, tables.comparison)
    if result["failed"]:
        told = "; ".join(f"{name} ({next(iter(seeds.values()))})" for name, seeds in result["failed"].items())
        raise MeguError(f"failed: {told}", "The others' results stand; the same command tries the failed ones again.")


def _workers(jobs: int | None, cluster: str | None, options: list[str]) -> Hire | None:
    """How a comparison gets the workers that the options ask for; ``None``: it needs none."""
    from megu_cli.compare.cluster import ClusterWorkers
    from megu_cli.compare.local import LocalWorkers
    from megu_cli.config import parse_override

    if cluster:
        parameters = {key: value for text in options for key, value in parse_override(text, "--cluster-option").items()}
        return partial(ClusterWorkers, cluster=cluster, options=parameters, number=jobs)
    return partial(LocalWorkers, number=jobs) if jobs and jobs > 1 else None
