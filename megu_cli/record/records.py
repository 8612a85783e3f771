"""What `megu record` writes: the statement of a run in its envelope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megu_cli.config import ForgetConfig
from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.record import envelope, fingerprints
from megu_cli.record.collect import salted
from megu_cli.record.statement import Asked, Identifier, Statement
from megu_cli.run import artifacts, files, writing

FILE = files.RECORD


def asked(
    forget: ForgetConfig,
    salt: bytes,
    *,
    id: str,
    reference: str | None = None,
    received: date | None = None,
    due: date | None = None,
    done: date | None = None,
) -> Asked:
    """A request as a record tells it.

    Raises:
        ConfigError: The id is a name, or the dates contradict each other.
        DataError: The list cannot be read.
    """
    check_id(id)
    sent = fingerprints.sent(forget)
    try:
        return Asked(
            id=id,
            reference=None if reference is None else salted(salt, f"reference:{reference}"),
            received=received,
            due=due,
            done=done,
            deletion_list=sent.get("list"),
            named=named(salt, sent),
            items=[salted(salt, f"item:{item.strip()}") for item in fingerprints.items(forget)],
        )
    except ValidationError as error:
        raise ConfigError(f"the request: {error.errors()[0]['msg']}") from None


def check_id(id: str) -> None:
    """See that an id may stand in a record as it is.

    Raises:
        ConfigError: It may be a name or an address.
    """
    try:
        TypeAdapter(Identifier).validate_python(id)
    except ValidationError:
        raise ConfigError(
            f"--request {id}: an id has letters, digits and . _ : # - only, at most 100",
            "It stands in the record in plain text: give a number of yours, not a name or an address.",
        ) from None


def named(salt: bytes, sent: Mapping[str, Any]) -> str | None:
    """Salted digest of what a request names; ``None`` where a list was sent."""
    return salted(salt, f"named:{sent['named']}") if "named" in sent else None


def check_sent(out: Path, requests: Sequence[Asked], salt: bytes) -> None:
    """See that a run was made for these requests.

    Raises:
        ArtifactError: It was made for others.
    """
    there = fingerprints.read(out)["requests"]
    if [(one.deletion_list, one.named) for one in requests] != [(one.get("list"), named(salt, one)) for one in there]:
        raise ArtifactError(
            f"the run in {out} was made for another request, or its list was changed since",
            "Restore the list or the config as it was, or run `megu run` again.",
        )


def write(path: Path, statement: Statement, key: Path | None) -> envelope.Envelope:
    """Write a record, signed where there is a key.

    Raises:
        ConfigError: The key cannot be used.
        ArtifactError: The file cannot be written, or another file stands there.
    """
    made = envelope.sealed(statement.plain, key)
    if path.exists() and path.stat().st_size:
        try:
            envelope.read(path)
        except ArtifactError:
            raise artifacts.foreign(path) from None
    with writing.replacing(path) as temporary:
        temporary.write_bytes(made.written)
    return made
