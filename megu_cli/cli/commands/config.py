"""The commands about the config alone: its JSON schema, and its validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from megu_cli.cli.console import say


def schema() -> None:
    """Print the JSON schema of megu.yaml, for editors and other tools.

    Example: megu schema > megu.schema.json
    """
    from megu_cli.config.json_schema import schema_text

    typer.echo(schema_text(), nl=False)


def validate(
    config: Annotated[Path, typer.Option("-c", "--config", metavar="FILE", help="The config.")] = Path("megu.yaml"),
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set noise.steps=80. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Check the config alone: every key, value and requirement. No data and no checkpoint are read.

    Exit code 2 if a setting is at fault; `megu run --dry-run` also checks the data and the request.
    Example: megu validate -c megu.yaml
    """
    from megu_cli.config import load_config
    from megu_cli.evaluation.requirements import parse

    parse(load_config(config, set_).eval.require)
    if as_json:
        typer.echo(json.dumps({"config": str(config), "valid": True}, ensure_ascii=False))
    else:
        say(f"{config}: valid")
