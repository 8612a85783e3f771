"""Every option that commands share, declared once; `command` adds them to a command."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

_RUN = "Which run"
_HOW = "How"
_OUTPUT = "Output"


@dataclass(frozen=True)
class Options:
    """The shared options of one call. Each field declares its flag, default and help."""

    config: Annotated[
        Path, typer.Option("-c", "--config", metavar="FILE", help="The config.", rich_help_panel=_RUN)
    ] = Path("megu.yaml")
    out: Annotated[
        Optional[Path],  # noqa: UP045 - read at run time, and Python 3.10 must read it too
        typer.Option("-o", "--out", metavar="DIR", help="The run directory.", rich_help_panel=_RUN),
    ] = None
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting, e.g. --set noise.steps=80. Repeatable.",
            rich_help_panel=_RUN,
        ),
    ] = ()  # type: ignore[assignment]
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="auto, cpu, cuda or mps.", rich_help_panel=_HOW),
    ] = None
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Seed of everything random.", rich_help_panel=_HOW),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Run again even if the result is fresh.", rich_help_panel=_HOW)
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and do nothing.", rich_help_panel=_HOW)
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_OUTPUT)] = (
        False
    )
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no log.", rich_help_panel=_OUTPUT)] = (
        False
    )
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="The traceback of what fails.", rich_help_panel=_OUTPUT)
    ] = False

    def having(self, key: str, value: object) -> Options:
        """The same with a setting that a flag of its own gives; ``None`` means that it was not given."""
        return self if value is None else replace(self, set_=[*self.set_, f"{key}={value}"])


def possible(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command refuse paths that no file can have, by the name of their option."""

    @functools.wraps(function)
    def wrapper(**given: Any) -> None:
        from megu_cli.config import checked_path

        for name, value in given.items():
            if isinstance(value, Path):
                checked_path(value, f"--{name}")
        function(**given)

    return wrapper


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a dataclass, such as `Options`: it takes one first, then parameters of its own."""
    own_hints = typing.get_type_hints(function, include_extras=True)
    kind = own_hints[next(iter(inspect.signature(function).parameters))]
    hints = typing.get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=list(field.default) if field.default == () else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[name])
        for name, parameter in list(inspect.signature(function).parameters.items())[1:]
    ]

    @functools.wraps(function)
    @possible
    def wrapper(**given: Any) -> None:
        options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        function(options, **given)

    signature = inspect.Signature([*own, *shared])
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    del wrapper.__wrapped__
    return wrapper
