"""The command that sets two runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

# Section -> head of its part of the table, and how many rows it may have.
_SECTIONS = {
    "versions": ("version", 20),
    "settings": ("setting", 100),
    "inputs": ("input (first digits of its digest)", 20),
    "request": ("request", 20),
    "figures": ("figure", 60),
}


def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show the settings, inputs and figures that differ between two runs.

    Only the run directories are read. Example: megu diff runs/a runs/b
    """
    from megu_cli.pipeline.differences import differences, read_run
    from megu_cli.text import shown

    found = differences(read_run(run_a), read_run(run_b))
    result: dict[str, Any] = {"a": str(run_a), "b": str(run_b), "same": not any(found.values()), **found}
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        _table(shown(result))


def _table(result: dict[str, Any]) -> None:
    from rich.table import Table

    from megu_cli.cli.console import output
    from megu_cli.pipeline.inputs import INPUTS

    words = {name: row.words for name, row in INPUTS.items()}
    console = output()
    if result["same"]:
        console.print("no setting, input or figure differs")
        return
    table = Table()
    for column in ("", result["a"], result["b"]):
        table.add_column(column, overflow="fold")
    for section, (head, most) in _SECTIONS.items():
        rows = result[section]
        if not rows:
            continue
        table.add_section()
        table.add_row(head, style="bold")
        for row in rows[:most]:
            table.add_row(
                words.get(row["name"], row["name"]) if section == "inputs" else row["name"],
                *(_value(section, row[side]) for side in ("a", "b")),
            )
        if len(rows) > most:
            table.add_row(f"and {len(rows) - most:,} more: --json", style="dim")
    console.print(table)


def _value(section: str, value: Any) -> str:
    if value is None:
        return "–"
    if section == "inputs":
        return str(value)[:12]
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
