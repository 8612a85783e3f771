"""Proof of a deletion: record it, check a record, find forgotten images that came back."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from megu_cli.cli.commands.shared import alone, display
from megu_cli.cli.console import say
from megu_cli.cli.options import Options

if TYPE_CHECKING:
    pass

Day = Annotated[Optional[datetime], typer.Option(formats=["%Y-%m-%d"], metavar="DATE")]  # noqa: UP045
Sign = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--sign", metavar="KEY", help="Sign the record with this key (Ed25519, PEM). Needs the extra sign."),
]
_Salt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--salt", metavar="FILE", help="Random bytes that salt the digests; else record.salt beside the run."),
]


def record(
    options: Options,
    request: Annotated[str, typer.Option("--request", metavar="ID", help="Your id of the request; no name.")],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reference", metavar="TEXT", help="The requester's own reference; stands there salted."),
    ] = None,
    received: Day = None,
    due: Day = None,
    done: Day = None,
    sign: Sign = None,
    salt: _Salt = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--to", metavar="FILE", help="Where to write it; else record.json in the run directory."),
    ] = None,
) -> None:
    """Write the deletion record of a finished run: digests, figures, and what it does not prove.

    Example: megu record --request DSR-17 --received 2026-11-02 --due 2026-12-02 --done 2026-11-25 --sign key.pem
    """
    from megu_cli.config import load_config
    from megu_cli.record import collect, records

    alone(options)
    config = load_config(options.config, list(options.set_), {"out": options.out})
    grains = collect.read_salt(salt) if salt else collect.salt_of(config.out)
    days = {name: day.date() if day else None for name, day in (("received", received), ("due", due), ("done", done))}
    asked = records.asked(config.forget, grains, id=request, reference=reference, **days)
    records.check_sent(config.out, [asked], grains)
    statement = collect.collect(config.out, [asked], grains)
    path = to or config.out / records.FILE
    made = records.write(path, statement, sign)
    if sign is None:
        say("the record is not signed: --sign KEY shows who wrote it", err=True)
    result = {"file": str(path), "sha256": made.digest, "signed": sign is not None, "statement": statement.plain}
    display(options, result, lambda r: say(f"{r['file']}\nsha256 of the record: {r['sha256']}"))


def verify(
    options: Options,
    file: Annotated[Path, typer.Argument(metavar="RECORD", help="The record, such as megu-run/record.json.")],
    key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--key", metavar="KEY", help="The signer's public key (PEM): the signature must be of its owner."),
    ] = None,
    salt: _Salt = None,
    lists: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--list", metavar="FILE", help="A deletion list as it was sent. Repeatable."),
    ] = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Also run the pipeline of -c again elsewhere, and compare the bytes.")
    ] = False,
    ledger: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--ledger", metavar="FILE", help="With --rerun: the ledger that the run was made with."),
    ] = None,
) -> None:
    """Check a deletion record: signature, form and, with -o RUN_DIR, every digest. Exit code 3 unless all of it holds.

    Example: megu verify record.json -o megu-run --key key.pub --rerun
    """
    from megu_cli.cli.commands.ledger import of_record
    from megu_cli.config import load_config
    from megu_cli.errors import ConfigError, RecordError
    from megu_cli.record import collect, envelope
    from megu_cli.record.verify import verify as check

    alone(options)
    if options.out is not None and not options.out.is_dir():
        raise ConfigError(f"-o {options.out}: there is no such run directory")
    beside = [folder / collect.SALT for folder in (options.out, file.parent) if folder is not None]
    grains = salt or next((path for path in beside if path.is_file()), None)
    found, statement = check(
        envelope.read(file),
        out=options.out,
        key=key,
        salt=collect.read_salt(grains) if grains else None,
        lists=lists or [],
    )
    if rerun and statement is not None:
        from megu_cli.cli.progress import tracker
        from megu_cli.record.rerun import rerun as again

        told = lambda line: None if options.quiet else say(line, err=True)  # noqa: E731
        with tempfile.TemporaryDirectory(prefix="megu-requests-") as folder:
            requests = None
            if ledger is not None:
                options, requests = of_record(options, ledger, statement, Path(folder))
            config = load_config(options.config, list(options.set_), {"out": options.out, "device": options.device})
            found.judge("second computation", again(statement, config, requests, tracker(options.quiet), told))
    result = {"holds": not found.faults, "held": found.held, "faults": found.faults, "not_checked": found.notes}
    display(options, result, _findings)
    if found.faults:
        raise RecordError(f"{file} does not hold: " + "; ".join(found.faults))


def _findings(result: dict[str, Any]) -> None:
    for line in result["held"]:
        say(f"holds: {line}")
    for line in result["not_checked"]:
        say(f"not checked: {line}")
    for line in result["faults"]:
        say(f"WRONG: {line}")


def check_data(
    options: Options,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Any folder, such as a new training set.")],
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--record", metavar="RECORD", help="Look for the images of this record; else of the run."),
    ] = None,
    salt: _Salt = None,
    farthest: Annotated[
        float,
        typer.Option("--farthest", metavar="SHARE", min=0, max=1, help="How far apart perceptual hashes may be."),
    ] = 0.22,
) -> None:
    """Find forgotten images that came back: byte copies, and resized or re-encoded ones. Exit code 3 if there are any.

    Needs the run directory alone, or a record. Example: megu check-data photos-2027 -o megu-run
    """
    from megu_cli.cli.progress import tracker
    from megu_cli.config import load_config
    from megu_cli.errors import DataError, RecordError
    from megu_cli.record import collect, returned

    alone(options)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", "Name the folder of the images to look at.")
    if file is not None:
        grains = salt or (beside if (beside := file.parent / collect.SALT).is_file() else None)
        known = returned.of_record(file, collect.read_salt(grains) if grains else None)
    else:
        known = returned.of_run(options.out or load_config(options.config, list(options.set_)).out)
    result = returned.search(folder, known, farthest, tracker(options.quiet))
    told = {
        "files": result.files,
        "found": {one.file: one.how for one in result.found},
        "undecodable": result.undecodable,
        "not_checked": list(known.notes),
    }
    display(options, told, _search)
    if result.found:
        raise RecordError(
            f"{len(result.found)} of {result.files} files in {folder} hold forgotten images",
            "Take them out of the data before you train on them.",
        )


def _search(result: dict[str, Any]) -> None:
    for name, how in result["found"].items():
        say(f"{name}: {how}")
    for line in result["not_checked"]:
        say(f"not checked: {line}")
    if bad := result["undecodable"]:
        say(f"{len(bad)} image files cannot be decoded: {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}")
    say(f"{len(result['found'])} of {result['files']} files hold forgotten images")
