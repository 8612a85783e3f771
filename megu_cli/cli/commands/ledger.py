"""The ledger of requests: add one, list them, and do all that are pending in one run."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from megu_cli.cli.commands.shared import check_max_steps, display, estimated, opened, show_eval
from megu_cli.cli.console import say
from megu_cli.cli.options import Options, possible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megu_cli.record.ledger import Entry, Ledger
    from megu_cli.record.statement import Statement

_File = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger, such as ledger.jsonl beside the model.")]
_Day = Annotated[Optional[datetime], typer.Option(formats=["%Y-%m-%d"], metavar="DATE")]  # noqa: UP045
_Names = Optional[list[str]]  # noqa: UP045


def group() -> typer.Typer:
    """`megu ledger` with its commands."""
    app = typer.Typer(no_args_is_help=True, help="Keep the requests: received, due, done, and by which record.")
    app.command("add")(possible(add))
    app.command("list")(possible(show))
    return app


def add(
    ledger: _File,
    request: Annotated[str, typer.Option("--request", metavar="ID", help="Your id of the request; no name.")],
    samples: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--samples", metavar="FILE", help="Its deletion list, in the ledger's folder."),
    ] = None,
    classes: Annotated[_Names, typer.Option("--class", metavar="NAME", help="A whole class. Repeatable.")] = None,
    subclasses: Annotated[_Names, typer.Option("--subclass", metavar="NAME", help="A sub-class. Repeatable.")] = None,
    subjects: Annotated[_Names, typer.Option("--subject", metavar="ID", help="A person. Repeatable.")] = None,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reference", metavar="TEXT", help="The requester's own reference."),
    ] = None,
    received: _Day = None,
    due: _Day = None,
) -> None:
    """Add a request.

    Example: megu ledger add ledger.jsonl --request DSR-17 --samples dsr17.csv --received 2026-11-02 --due 2026-12-02
    """
    from megu_cli.config import ForgetConfig, section
    from megu_cli.record.ledger import Ledger

    given = {"samples": samples, "classes": classes, "subclasses": subclasses, "subjects": subjects}
    forget = section(ForgetConfig, "forget", {kind: value for kind, value in given.items() if value is not None})
    days = [day.date() if day else None for day in (received, due)]
    book = Ledger(ledger)
    book.add(request, forget, days[0], days[1], reference)
    say(f"{request} is pending, {len(book.pending())} in all")


def show(
    ledger: _File,
    on: Annotated[
        Optional[datetime],  # noqa: UP045
        typer.Option("--on", formats=["%Y-%m-%d"], metavar="DATE", help="Mark what is overdue on this day."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List all requests: received, due, done, and the record.

    Example: megu ledger list ledger.jsonl --on 2026-12-01
    """
    from megu_cli.record.ledger import Ledger

    rows = [_row(entry, on.date().isoformat() if on else None) for entry in Ledger(ledger).entries()]
    display(Options(json=as_json), {"requests": rows}, _table)


def _row(entry: Entry, on: str | None) -> dict[str, Any]:
    done = entry.done or {}
    return {
        "request": entry.id,
        "received": entry.received,
        "due": entry.due,
        "done": done.get("done"),
        "record": done.get("record"),
        "overdue": bool(on and entry.due and not done and entry.due < on),
    }


def _table(result: dict[str, Any]) -> None:
    from rich.table import Table

    from megu_cli.cli.console import SafeConsole

    table = Table("request", "received", "due", "done", "record")
    for row in result["requests"]:
        state = row["done"] or ("OVERDUE" if row["overdue"] else "pending")
        table.add_row(row["request"], row["received"] or "–", row["due"] or "–", state, (row["record"] or "")[:12])
    SafeConsole().print(table)


def run_pending(
    options: Options,
    file: Path,
    done: date | None,
    sign: Path | None,
    require: list[str] | None,
    max_steps: int | None = None,
) -> None:
    """Do all pending requests in one unlearning, write the record, and mark them done.

    Raises:
        ConfigError: There is no day, or --max-steps is given and the method is retrain.
        MeguError: Whatever the run raises; the requests then stay pending.
    """
    from megu_cli.config import load_config
    from megu_cli.errors import ConfigError
    from megu_cli.record import collect, ledger, records
    from megu_cli.record.fingerprints import keep

    if done is None and not options.dry_run:
        raise ConfigError("--ledger needs --done DATE: megu reads no clock", "Give the day as YYYY-MM-DD.")
    book = ledger.Ledger(file)
    entries, runs = book.pending(), book.runs()
    if not entries:
        display(options, {"requests": []}, lambda r: say("no request is pending"))
        return
    config = load_config(options.config, list(options.set_), {"out": options.out})
    out = options.out or config.out / f"{len(runs) + 1:03d}"
    check_max_steps(replace(options, out=out), max_steps)
    say(f"{len(entries)} requests are pending: {', '.join(entry.id for entry in entries)}", err=True)
    with ExitStack() as stack:
        # Nothing is written by a dry run.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if options.dry_run else out
        options = replace(_prepared(options, book, entries, runs[-1] if runs else None, folder), out=out)
        with opened(options, require) as (pipeline, config):
            if options.dry_run:
                from megu_cli.cli import tables

                display(options, estimated(pipeline, None, options.force), tables.plan)
                return
            pipeline.run(force=options.force)
            keep(pipeline.context, ledger.sent(book, entries))
            salt = collect.salt_of(out)
            assert done is not None  # refused above
            statement = collect.collect(out, ledger.asked(book, entries, salt, done), salt)
            record = records.write(out / records.FILE, statement, sign)
            notes = pipeline.context.inputs.notes
        book.close([entry.id for entry in entries], done, record.digest, ledger.deployed(out))
    say(f"{', '.join(entry.id for entry in entries)}: done by {ledger.deployed(out)}", err=True)
    say(f"record: {out / records.FILE}", err=True)
    show_eval(options, config, notes)


def of_record(options: Options, file: Path, statement: Statement, folder: Path) -> tuple[Options, list[dict[str, Any]]]:
    """The options that the run of a record was made with, and its requests as forgotten.json tells them.

    Args:
        options: Those of this call.
        file: The ledger.
        statement: The record's.
        folder: Takes the joined list, where there is one.
    """
    from megu_cli.record import ledger

    book = ledger.Ledger(file)
    entries, before = ledger.of_record(book, statement)
    return _prepared(options, book, entries, before, folder), ledger.sent(book, entries)


def _prepared(
    options: Options, book: Ledger, entries: Sequence[Entry], before: Mapping[str, Any] | None, folder: Path
) -> Options:
    """The options with the requests as the forget request, and the model of the run before as the checkpoint."""
    from megu_cli.config import load_config
    from megu_cli.record import ledger

    settings = list(options.set_)
    if before and not any(setting.startswith("model.checkpoint=") for setting in settings):
        # It was proven when it was made, and what it has forgotten it no longer classifies.
        settings += [f"model.checkpoint={json.dumps(str(book.model(before)))}", "model.preflight=false"]
    # Classes and people are looked up in the data as the run will have them.
    config = load_config(options.config, settings, {"out": options.out})
    forget = ledger.together(book, entries, config, folder)
    return replace(options, set_=[*settings, f"forget={json.dumps(forget)}"])
