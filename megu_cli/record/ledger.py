"""The ledger: an append-only file of deletion requests. Each line holds the digest of the line before it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from megu_cli.config import Config, ForgetConfig, section
from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.pipeline.context import RunContext
from megu_cli.record import fingerprints, records
from megu_cli.record.statement import Asked, Statement
from megu_cli.request import deletion_list
from megu_cli.run import artifacts, files, ownership, reading, writing
from megu_cli.run.json_lines import JSONLines
from megu_cli.run.log import RunLog

KINDS = ("samples", "classes", "subclasses", "subjects")


@dataclass(frozen=True)
class Entry:
    """One request of the ledger.

    Attributes:
        id: Its id.
        forget: What it names, with the list's path relative to the ledger.
        received: Date, as ISO text.
        due: Date, as ISO text.
        reference: The requester's own reference.
        list_digest: sha256 of the list when it was added.
        done: The line that says that it was done.
    """

    id: str
    forget: Mapping[str, Any]
    received: str | None
    due: str | None
    reference: str | None
    list_digest: str | None
    done: Mapping[str, Any] | None = field(default=None)


class Ledger:
    """A ledger file.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JSONLines(path, "the ledger is not used until it is restored")

    def lines(self) -> list[dict[str, Any]]:
        """All lines, in order.

        Raises:
            ArtifactError: A line was changed, taken out or put in between, or the file is no ledger.
        """
        found, previous = self._lines.read(), ""
        for number, line in enumerate(found, 1):
            if line.get("previous") != previous or line.get("kind") not in ("received", "done"):
                raise self._broken(f"line {number} does not follow the line before it")
            previous = artifacts.digest(line)
        raw = reading.content(self.path) if self.path.exists() else b""
        # A last line without an end was cut by a kill, and the next one replaces it.
        whole = [line for line in raw.split(b"\n")[:-1] if line.strip()]
        if len(whole) > len(found):
            raise self._broken(f"{len(whole) - len(found)} of its lines are damaged")
        return found

    def _broken(self, why: str) -> ArtifactError:
        return ArtifactError(f"the ledger {self.path} was changed: {why}", "Restore it from a backup.")

    def entries(self) -> list[Entry]:
        """All requests, in the order in which they were added.

        Raises:
            ArtifactError: See `lines`.
        """
        lines = self.lines()
        done = {name: line for line in lines if line["kind"] == "done" for name in line["requests"]}
        return [
            Entry(
                line["request"], line["forget"], line["received"], line["due"], line["reference"], line["list"],
                done.get(line["request"]),
            )
            for line in lines if line["kind"] == "received"
        ]  # fmt: skip

    def pending(self) -> list[Entry]:
        """The requests that are not done."""
        return [entry for entry in self.entries() if entry.done is None]

    def add(
        self, id: str, forget: ForgetConfig, received: date | None, due: date | None, reference: str | None
    ) -> None:
        """Add a request.

        Raises:
            ConfigError: The id is there already or is no id, dates contradict each other, or the list lies elsewhere.
            DataError: The list cannot be read.
        """
        named = forget.model_dump(mode="json", include=set(KINDS), exclude_none=True)
        digest = None
        if forget.samples is not None:
            fingerprints.sent(forget)  # a list that cannot be read is refused now
            folder = self.path.resolve().parent
            if not artifacts.within(folder, forget.samples):
                raise ConfigError(
                    f"--samples {forget.samples}: the list lies outside the ledger's folder {folder}",
                    "Move it beside the ledger, which names it by a relative path.",
                )
            named = {"samples": forget.samples.resolve().relative_to(folder).as_posix()}
            digest = artifacts.file_digest(forget.samples)
        if received and due and due < received:
            raise ConfigError("--due lies before --received")
        records.check_id(id)
        line = {
            "kind": "received",
            "request": id,
            "forget": named,
            "received": received and received.isoformat(),
            "due": due and due.isoformat(),
            "reference": reference,
            "list": digest,
        }
        with writing.locked(self.path.resolve().parent):
            if any(entry.id == id for entry in self.entries()):
                raise ConfigError(f"--request {id}: this request is in the ledger already")
            self._append(line)

    def close(self, requests: Sequence[str], done: date, record: str, model: Path) -> None:
        """Add that requests are done.

        Args:
            requests: Their ids.
            done: When.
            record: Digest of the record.
            model: The unlearned model: a file, or a directory of transformers.
        """
        folder = self.path.resolve().parent
        line = {
            "kind": "done",
            "requests": list(requests),
            "done": done.isoformat(),
            "record": record,
            "model": Path(os.path.relpath(model.resolve(), folder)).as_posix(),
            "sha256": _digest_of(model),
        }
        with writing.locked(folder):
            self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        lines = self.lines()
        self._lines.append({**line, "previous": artifacts.digest(lines[-1]) if lines else ""})

    def forget(self, entry: Entry) -> ForgetConfig:
        """What a request names, with its list's path.

        Raises:
            ConfigError: The list is gone, or was changed since it was added.
        """
        if "samples" not in entry.forget:
            return section(ForgetConfig, "forget", entry.forget)
        path = self.path.resolve().parent / str(entry.forget["samples"])
        try:
            same = artifacts.file_digest(path) == entry.list_digest
        except OSError as error:
            raise ConfigError(f"the list {path} of request {entry.id} cannot be read: {error.strerror}") from None
        if not same:
            raise ConfigError(
                f"the list {path} of request {entry.id} was changed since it was added to the ledger",
                "Restore it as it was sent, or add what is new as another request.",
            )
        return section(ForgetConfig, "forget", {"samples": path})

    def runs(self) -> list[dict[str, Any]]:
        """The lines that say what was done."""
        return [line for line in self.lines() if line["kind"] == "done"]

    def model(self, done: Mapping[str, Any]) -> Path:
        """The unlearned model that a line names.

        Raises:
            ConfigError: It is not there, or is another one.
        """
        path = self.path.resolve().parent / str(done["model"])
        hint = "If it was moved, name it: --set model.checkpoint=FILE."
        if not path.exists():
            raise ConfigError(f"the ledger's last model {path} is not there", hint)
        if _digest_of(path) != done["sha256"]:
            raise ConfigError(f"{path} is not the model that the ledger names: its sha256 differs", hint)
        return path


def _digest_of(model: Path) -> str:
    """sha256 of a file, or of the names and sha256 of the files in a directory."""
    if not model.is_dir():
        return artifacts.file_digest(model)
    held = sorted(path for path in model.iterdir() if path.is_file())
    return artifacts.digest([[path.name, artifacts.file_digest(path)] for path in held])


def deployed(out: Path) -> Path:
    """The unlearned model of a run directory as the user's checkpoint came: a directory, a `.pth`, or safetensors."""
    if (out / files.UNLEARNED).is_dir():
        return out / files.UNLEARNED
    written = artifacts.read_meta(out / files.FINETUNE).get("files", {})
    return out / next((name for name in written if "/" not in name), files.WEIGHTS)


def sent(ledger: Ledger, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The requests as forgotten.json tells them."""
    return [{"id": entry.id, **fingerprints.sent(ledger.forget(entry))} for entry in entries]


def asked(ledger: Ledger, entries: Sequence[Entry], salt: bytes, done: date) -> list[Asked]:
    """The requests as a record tells them."""
    return [
        records.asked(
            ledger.forget(entry),
            salt,
            id=entry.id,
            reference=entry.reference,
            received=date.fromisoformat(entry.received) if entry.received else None,
            due=date.fromisoformat(entry.due) if entry.due else None,
            done=done,
        )
        for entry in entries
    ]


def together(ledger: Ledger, entries: Sequence[Entry], config: Config, out: Path) -> dict[str, Any]:
    """One forget request that stands for several, as a section of the config.

    Requests of one kind are joined. Others become one list of names, requests.csv in the run directory.

    Args:
        ledger: The ledger.
        entries: The requests.
        config: Of the run; its own forget request does not matter.
        out: The run directory.

    Raises:
        ConfigError: Lists of names and lists of indices cannot be joined, or a list was changed.
    """
    asked = [ledger.forget(entry) for entry in entries]
    kinds = {next(kind for kind in KINDS if getattr(one, kind) is not None) for one in asked}
    if len(kinds) == 1 and "samples" not in kinds:
        kind = kinds.pop()
        return {kind: list(dict.fromkeys(name for one in asked for name in getattr(one, kind)))}
    if len(asked) == 1:
        return {"samples": str(asked[0].samples)}
    cells: dict[str, None] = {}
    headers = set()
    for one in asked:
        if one.samples is not None:
            headers.add(deletion_list.kind_of(one.samples))
            cells |= dict.fromkeys(cell.strip() for cell in deletion_list.cells(one.samples))
        else:
            headers.add("path")
            cells |= dict.fromkeys(_names(config, one))
    if "index" in headers and len(headers) > 1:
        raise ConfigError(
            "the pending requests name images by index and by name, which cannot be joined",
            "Write all lists with names.",
        )
    stream = io.StringIO(newline="")
    header = "index" if "index" in headers else "sample" if "either" in headers else "path"
    csv.writer(stream, lineterminator="\n").writerows([[header], *([cell] for cell in cells)])
    return {"samples": str(_write(out, stream.getvalue().encode()))}


def _names(config: Config, forget: ForgetConfig) -> list[str]:
    """Names of the training images of classes or people."""
    own = forget.model_copy(update={"already_missing": config.forget.already_missing})
    context = RunContext.open(config.model_copy(update={"forget": own}))
    return [context.inputs.data.train.names[position] for position in context.inputs.request.forget.tolist()]


def _write(out: Path, content: bytes) -> Path:
    path, log = out / files.REQUESTS, RunLog(out)
    if path.exists() and path.read_bytes() == content:
        return path
    ownership.refuse_foreign(out, files.REQUESTS, log.written(files.REQUESTS))
    out.mkdir(parents=True, exist_ok=True)
    with writing.replacing(path) as temporary:
        temporary.write_bytes(content)
        log.append({"stage": "ledger", "fingerprint": artifacts.digest(content.decode()), "files":
                    {files.REQUESTS: ownership.parts(temporary)}})  # fmt: skip
    return path


def of_record(ledger: Ledger, statement: Statement) -> tuple[list[Entry], Mapping[str, Any] | None]:
    """The requests of a record, and the line of what was done before them.

    Raises:
        ConfigError: The ledger does not know them.
    """
    ids = [request.id for request in statement.predicate.requests]
    runs = ledger.runs()
    place = next((i for i, line in enumerate(runs) if line["requests"] == ids), None)
    if place is None:
        raise ConfigError(f"the ledger {ledger.path} has no run of {', '.join(ids)}")
    known = {entry.id: entry for entry in ledger.entries()}
    return [known[name] for name in ids], runs[place - 1] if place else None
