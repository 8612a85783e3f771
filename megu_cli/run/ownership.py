"""Which files of a run directory megu wrote: they say so, or runs.jsonl knows them. No other file is replaced."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.run.artifacts import foreign, opened
from megu_cli.run.writing import linked

# Of what `parts` records: bytes of the head, and the number of parts.
_HEAD, _PARTS = 64, 16
# How a line of ours begins: with its checksum; without one those of earlier versions.
_FIRST_KEYS = (b'{"checksum": "', b'{"time": "', b'{"stage": "', b'{"key": "')


def parts(path: Path) -> dict[str, Any]:
    """What recognises a file when it is met again, also where it was damaged: its size and digests of its parts."""
    size = path.stat().st_size
    with opened(path) as stream:
        head = hashlib.sha256(stream.read(_HEAD)).hexdigest()[:16]
    return {"bytes": size, "head": head, "parts": _digests(path, _part(size))}


def recognised(path: Path, recorded: dict[str, Any]) -> bool:
    """True if a file is the one that `parts` describes, damaged or not.

    Half of the parts that it has must be as they were. A file that is cut off within the first part must begin as the
    recorded one does, as far as that can be told.
    """
    try:
        size, was, known = path.stat().st_size, int(recorded["bytes"]), list(recorded["parts"])
        if size > 2 * was:
            return False
        if size < min(was, _part(was)):
            with opened(path) as stream:
                return size < _HEAD or bool(recorded["head"] == hashlib.sha256(stream.read(_HEAD)).hexdigest()[:16])
        found = _digests(path, _part(was))
    except (OSError, KeyError, TypeError, ValueError):
        return False
    if size < was:
        found = found[: size // _part(was)]  # the last one is cut
    same = sum(a == b for a, b in zip(found, known, strict=False))
    return bool(2 * same >= max(1, len(found)))


def _part(size: int) -> int:
    """Bytes of each part of a file."""
    return max(_HEAD, -(-size // _PARTS))


def _digests(path: Path, step: int) -> list[str]:
    found: list[str] = []
    with opened(path) as stream:
        while True:
            total, left = hashlib.sha256(), step
            while left and (block := stream.read(min(left, 1 << 20))):
                total.update(block)
                left -= len(block)
            if left == step:
                return found
            found.append(total.hexdigest()[:16])


def marked(path: Path) -> bool:
    """True if a file shows by itself that megu wrote it, also where it was damaged."""
    with opened(path) as stream:
        head = stream.read(2048)
    if path.suffix in (".safetensors", ".checkpoint"):
        return b'{"__metadata__":{"megu":' in head
    if path.suffix == ".png":
        return b"megu" in head[:256]
    if path.name.endswith(".error.txt"):
        return head.startswith(b"Traceback (most recent call last)")
    if path.suffix == ".html":
        return b'<meta name="generator" content="megu ' in head
    if path.suffix == ".md":
        return head.startswith(b"# Unlearning report: ")
    if path.suffix == ".jsonl":
        return _log_of_ours(path)
    return path.suffix == ".json" and _json_of_ours(path)


def _json_of_ours(path: Path) -> bool:
    with opened(path) as stream:
        content = stream.read()
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content.startswith(b'{\n "')  # the layout of ours, cut off or damaged
    meta = body.get("meta", body) if isinstance(body, dict) else None
    # An artifact, or a report.
    return isinstance(meta, dict) and ({"checksum", "content"} <= meta.keys() or {"megu", "sections"} <= meta.keys())


def _log_of_ours(path: Path) -> bool:
    """Whether any line is an entry of runs.jsonl or an answer; a single line that was cut must begin like one."""
    with opened(path) as stream:
        content = stream.read()
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            name = "key" if path.name.startswith("similarity") else "fingerprint"
            if isinstance(entry, dict) and re.fullmatch("[0-9a-f]{64}", str(entry.get(name))):
                return True
            if line == content.rstrip(b"\n"):
                return False
    return b"\n" not in content and any(content[: len(key)] == key[: len(content)] for key in _FIRST_KEYS)


def refuse_foreign(folder: Path, name: str, records: Iterable[dict[str, Any]] = ()) -> None:
    """See that a file of a run directory may be replaced: it is not there, or megu wrote it.

    Args:
        folder: The run directory.
        name: The file, relative to it.
        records: What `parts` said of files that megu wrote here under this name.

    Raises:
        ForeignFileError: It was not written by megu, or is, or is reached by, a symbolic link.
    """
    path = folder / name
    for link in (path, *path.parents[: len(Path(name).parts) - 1]):
        if link.is_symlink():
            raise linked(link)
    try:
        if not path.exists():
            return
        ours = path.is_file() and (
            not path.stat().st_size or marked(path) or any(recognised(path, record) for record in records)
        )
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from None
    if not ours:
        raise foreign(path)


def refuse_other(option: str, path: Path, ours: Callable[[BinaryIO], bool], otherwise: str, hint: str) -> None:
    """See that a file outside the run directory may be written: it is not there, or the same option wrote it.

    Args:
        option: The option that names it.
        path: The file.
        ours: Tells from its content that the option wrote it.
        otherwise: What else it is, in words.
        hint: What to do if it is something else.

    Raises:
        ConfigError: It may not be written.
    """
    try:
        if not path.exists():
            return
        with path.open("rb") as stream:
            known = ours(stream)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}") from None
    if not known:
        raise ConfigError(f"{option} {path} is there already, and is {otherwise}", hint)
