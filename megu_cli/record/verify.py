"""Whether a record holds: its signature, its form, and what the run directory, lists and keys at hand say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megu_cli.errors import ArtifactError, MeguError, brief
from megu_cli.pipeline import purge
from megu_cli.record import collect, envelope, records
from megu_cli.record.envelope import PAYLOAD, Envelope
from megu_cli.record.fingerprints import read as read_fingerprints
from megu_cli.record.statement import Asked, Statement
from megu_cli.request.deletion_list import cells
from megu_cli.run import artifacts


@dataclass
class Findings:
    """What a check of a record gave.

    Attributes:
        faults: What does not hold, a line each; empty: it holds as far as it was checked.
        held: What was checked and holds.
        notes: What was not checked, and why.
    """

    faults: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def judge(self, what: str, faults: Sequence[str]) -> None:
        """Note what a check gave: its faults, or that it holds."""
        self.faults += faults
        if not faults:
            self.held.append(what)


def statement_of(record: Envelope) -> Statement:
    """The statement in a record.

    Raises:
        ArtifactError: It has not the form of a deletion record; the keys at fault are named.
    """
    if record.payload_type != PAYLOAD:
        raise ArtifactError(f"payloadType is {brief(record.payload_type)}, not {PAYLOAD}")
    try:
        plain = artifacts.strict_json(record.payload)
        statement = Statement.model_validate(plain)
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'statement'}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
            for fault in error.errors()[:5]
        )
        raise ArtifactError(f"the statement does not fit the schema: {told}") from None
    except ValueError as error:
        raise ArtifactError(f"the payload is no statement: {error}") from None
    if artifacts.canonical(statement.plain) != record.payload:
        raise ArtifactError("the payload is not written as megu writes it: keys in order, no spaces, dates as dates")
    return statement


def verify(
    record: Envelope,
    *,
    out: Path | None = None,
    key: Path | None = None,
    salt: bytes | None = None,
    lists: Sequence[Path] = (),
) -> tuple[Findings, Statement | None]:
    """Check a record against all that is at hand.

    Args:
        record: The record.
        out: The run directory.
        key: The signer's public key.
        salt: Of the record.
        lists: Deletion lists as they were sent.

    Raises:
        ConfigError: A key cannot be read.
        DataError: A list cannot be read.
    """
    found = Findings()
    if key is not None:
        found.judge("signature", [f"signature: {wrong}"] if (wrong := envelope.signed_by(record, key)) else [])
    elif record.signatures:
        found.notes.append("the signature was not checked: name the signer's public key with --key")
    else:
        found.notes.append("the record is not signed: whoever can write the file can change it")
    try:
        statement = statement_of(record)
    except ArtifactError as error:
        found.faults.append(error.message)
        return found, None
    found.held.append("form")
    if salt is None:
        found.notes.append("salted digests were not checked: name the salt with --salt")
    elif statement.predicate.salt.check != collect.check_of(salt):
        found.faults.append("salt: it is not the salt of this record")
        salt = None
    for path in lists:
        found.judge(f"list {path.name}", list(_of_list(statement, path, salt)))
    if out is None:
        found.notes.append("the files were not checked: name the run directory with -o")
    else:
        _of_run(found, statement, out, salt)
    return found, statement


def _of_list(statement: Statement, path: Path, salt: bytes | None) -> Iterator[str]:
    digest = artifacts.file_digest(path)
    request = next((one for one in statement.predicate.requests if one.deletion_list == digest), None)
    if request is None:
        yield f"list: {path.name} is not a list of this record: its sha256 is {digest}"
    elif salt is not None and request.items != [collect.salted(salt, f"item:{cell.strip()}") for cell in cells(path)]:
        yield f"requests.{request.id}.items: they are not the lines of {path.name}"


def _of_run(found: Findings, statement: Statement, out: Path, salt: bytes | None) -> None:
    """Hold a record against a run directory."""
    predicate = statement.predicate
    wrong = []
    for name, digest in predicate.files.items():
        path = out / name
        if not artifacts.within(out, path):
            wrong.append(f"files.{brief(name)}: it is no file of a run directory")
        elif not path.exists():
            if purge.may_go(name):
                found.notes.append(f"{name} is not there; `megu purge` deletes it")
            else:
                wrong.append(f"{name} is not there")
        elif artifacts.file_digest(path) != digest:
            wrong.append(f"{name} is not the file of the record: its sha256 differs")
    found.judge(f"{len(predicate.files)} files", wrong)
    if wrong:
        return  # the rest would only repeat it
    try:
        now = collect.collect(out, predicate.requests, salt or bytes(16))
        found.judge("requests", list(_requests(predicate.requests, read_fingerprints(out)["requests"], salt)))
    except (MeguError, ValidationError) as error:
        found.faults.append(error.message if isinstance(error, MeguError) else f"the run directory is damaged: {error}")
        return
    for part in ("subject", "forgotten", "parent", "settings", "versions", "figures"):
        recorded, there = (
            (statement.plain["subject"], now.plain["subject"])
            if part == "subject"
            else (statement.plain["predicate"][part], now.plain["predicate"][part])
        )
        found.judge(part, list(_differences(part, recorded, there, salt is not None)))
    if extra := sorted(set(now.predicate.files) - set(predicate.files)):
        found.faults.append(f"files: the record leaves out {', '.join(extra)}")


def _requests(recorded: Sequence[Asked], there: Sequence[dict[str, Any]], salt: bytes | None) -> Iterator[str]:
    """What of the recorded requests the run was not made for."""
    if len(recorded) != len(there):
        yield f"requests: the record has {len(recorded)}, the run was made for {len(there)}"
        return
    for one, run in zip(recorded, there, strict=True):
        if one.deletion_list != run.get("list") or (salt and one.named != records.named(salt, run)):
            yield f"requests.{one.id}: its list or names are not those that the run was made for"
        elif len(one.items) != run["items"]:
            yield f"requests.{one.id}.items: the record has {len(one.items)}, the run was made for {run['items']}"


def _differences(name: str, recorded: Any, there: Any, salted: bool) -> Iterator[str]:
    """Which values of the record are not what the run directory gives, by their keys."""
    if not salted and name in ("forgotten.image_digests", "forgotten.copy_digests"):
        return
    if isinstance(recorded, dict) and isinstance(there, dict):
        for key in sorted(recorded.keys() | there.keys()):
            yield from _differences(f"{name}.{key}", recorded.get(key), there.get(key), salted)
    elif not salted and str(there).startswith("salted:") and str(recorded).startswith("salted:"):
        return
    elif recorded != there:
        shown = brief(recorded), brief(there)
        told = f"the record says {shown[0]}, the run directory {shown[1]}" if max(map(len, shown)) < 60 else "differs"
        yield f"{name}: {told}"
