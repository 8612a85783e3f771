"""Once a run is done: its report, and the purge."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from megu_cli.cli.commands.shared import Require, alone, display, opened
from megu_cli.cli.console import say
from megu_cli.cli.options import Options
from megu_cli.run.files import ORACLE, ORIGINAL, REPORT

if TYPE_CHECKING:
    from megu_cli.evaluation.requirements import Outcome
    from megu_cli.pipeline.context import RunContext


class _Format(str, Enum):
    html = "html"
    md = "md"
    json = "json"


def report(
    options: Options,
    form: Annotated[
        _Format, typer.Option("--format", help="One self-contained page, Markdown, or JSON.")
    ] = _Format.html,
    show_forgotten: Annotated[
        bool, typer.Option("--show-forgotten", help="Show a few of the forgotten images (html only).")
    ] = False,
    card: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.md", help="Write a Hugging Face model card of the unlearned model, and stop."),
    ] = None,
    require: Require = None,
) -> None:
    """Write a report that opens from disk: report.html in the run directory.

    --card writes a model card instead, such as README.md of a repository on the Hugging Face hub. It names no image.

    Example: megu report --format md
    """
    from megu_cli import report as reports
    from megu_cli.errors import ArtifactError, ConfigError
    from megu_cli.evaluation.requirements import judge, parse
    from megu_cli.pipeline.stages import STAGES
    from megu_cli.run.artifacts import read_body
    from megu_cli.run.ownership import refuse_foreign

    if card is not None and show_forgotten:
        raise ConfigError("give only one of --card, --show-forgotten", "A model card names and shows no image.")
    if show_forgotten and form is not _Format.html:
        raise ConfigError(f"--show-forgotten needs --format html: {form.value} holds no pictures")
    with opened(options, require, write=False) as (pipeline, config):
        state = pipeline.state("eval")
        file = config.out / STAGES["eval"].file
        if state.status not in ("fresh", "blocked") or not file.is_file():
            raise ArtifactError(
                f"no report: {file.name} is {'missing' if state.status == 'blocked' else state.status} "
                f"({state.reason})",
                "Rebuild it with `megu eval`, or everything with `megu run`.",
            )
        notices = []
        if state.status == "blocked":
            # The evaluation can be read where the data are not; whether it still fits them cannot be told there.
            notices.append(f"It could not be checked here whether this evaluation is up to date: {state.reason}.")
        outcomes = judge(parse(config.eval.require), read_body(file))
        if card is not None:
            _write_card(options, pipeline.context, outcomes, card, notices)
            return
        refuse_foreign(config.out, f"{REPORT}.{form.value}")
        if options.dry_run:
            display(options, {"file": str(config.out / f"{REPORT}.{form.value}")}, lambda r: say(r["file"]))
            return
        path = reports.write(
            pipeline.context, outcomes, form=form.value, show_forgotten=show_forgotten, notices=notices
        )
    for notice in notices:
        say(notice, err=True)
    result = {"file": str(path), "format": form.value, "bytes": path.stat().st_size, "shows_forgotten": show_forgotten}
    display(options, result, lambda r: say(f"wrote {r['file']} ({r['bytes'] / 1e3:,.0f} kB)"))


def _write_card(
    options: Options, context: RunContext, outcomes: Sequence[Outcome], file: Path, notices: Sequence[str]
) -> None:
    from megu_cli import report as reports
    from megu_cli.report.card import check

    check(file, options.force)
    if not options.dry_run:
        reports.write_card(context, outcomes, file, notices)
    verb = "would write" if options.dry_run else "wrote"
    display(options, {"file": str(file)}, lambda r: say(f"{verb} {r['file']}: a model card that names no image"))


def purge(
    options: Options,
    original: Annotated[
        bool, typer.Option("--original", help="Also original.safetensors, the model that `megu train` made.")
    ] = False,
    oracle: Annotated[bool, typer.Option("--oracle", help="Also oracle.safetensors, the retrained model.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Delete what holds traces of the forgotten data, once the result is accepted.

    The unlearned model, the figures and the digests stay. Needs the run directory alone: -o names one whose config or
    data are gone. Example: megu purge --original
    """
    from megu_cli.cli import tables
    from megu_cli.config import load_config
    from megu_cli.pipeline import purge as traces
    from megu_cli.run.writing import locked

    alone(options)
    out = options.out or load_config(options.config, list(options.set_)).out
    if not (options.force and out.is_dir()):
        traces.check(out)
    with contextlib.nullcontext() if options.dry_run else locked(out):
        asked = {ORIGINAL: original, ORACLE: oracle}
        going = traces.traces(out, also=[file for file, wanted in asked.items() if wanted])
        result: dict[str, Any] = {
            "deleted": {trace.path.relative_to(out).as_posix(): trace.what for trace in going},
            "kept": traces.kept(out, going),
        }
        if going and not options.dry_run:
            if not yes:
                _confirm(result)
            traces.delete(going)
    display(options, {**result, "dry_run": options.dry_run}, tables.purge)


def _confirm(result: dict[str, Any]) -> None:
    """Ask on stderr before deleting.

    Raises:
        InputError: There is nobody to ask, or the answer is no.
    """
    from megu_cli.errors import InputError

    for name, what in result["deleted"].items():
        say(f"  {name}: {what}", err=True)
    try:
        sure = typer.confirm("Delete these for good?", err=True)
    except typer.Abort:
        say("", err=True)  # the question has no end of line
        raise InputError("nothing was deleted: the question was not answered", "Say --yes to purge unasked.") from None
    if not sure:
        raise InputError("nothing was deleted")
