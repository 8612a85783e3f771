"""Artifacts that were damaged or made up: each is refused or built again, and nothing else is touched."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from conftest import write_config
from hypothesis import strategies as st

from megu_cli.run import artifacts

from .conftest import PHOTOS
from .harness import call, expected_errors, fresh, fuzz
from .material import as_json, changed, damaged

JSON = ("similarity.json", "finetune.json", "eval.json")
TENSORS = (
    "original.safetensors",
    "transition.safetensors",
    "labels.safetensors",
    "noise.safetensors",
    "model.safetensors",
)
OTHER = (".digests.npy", "runs.jsonl")
# The last four write. A run builds again what is corrupt.
COMMANDS = (
    ("similarity", "--dry-run"),
    ("similarity", "--dry-run"),
    ("status",),
    ("report", "--dry-run"),
    ("purge", "--dry-run"),
    ("similarity",),
    ("labels",),
    ("report", "--format", "json"),
    ("run",),
)
WRITES = COMMANDS[5:]
LENGTHS = (0, 1, 2**31, 2**63, 2**64 - 1)


def sealed(document: Any, tensors: str | None) -> Any:
    """A document whose digests fit its changed body and meta: damage does not do this, but a stranger can."""
    try:
        body, meta = document["body"], dict(document["meta"])
        meta["content"] = artifacts.digest([body] if tensors is None else [body, tensors])
        meta.pop("checksum", None)
        return {"body": body, "meta": {**meta, "checksum": artifacts.digest(meta)}}
    except (TypeError, KeyError, ValueError, RecursionError):
        return document


@st.composite
def described(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A JSON artifact, or the header of one with tensors, with odd nodes."""
    resealed = draw(st.booleans())
    if name in JSON:
        document = json.loads(content)
        whole = {"meta": document.pop("meta"), "body": document}
        whole = draw(changed(whole))
        whole = sealed(whole, None) if resealed else whole
        if isinstance(whole, dict) and isinstance(whole.get("body"), dict) and "meta" in whole:
            whole = {**whole["body"], "meta": whole["meta"]}
        return as_json(whole).encode("utf-8", "replace")
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    if "megu" in metadata and draw(st.booleans()):
        whole = draw(changed(json.loads(metadata["megu"])))
        whole = sealed(whole, "0" * 64) if resealed else whole
        header["__metadata__"] = {"megu": as_json(whole)}
    else:
        header = draw(changed(header))
    text = as_json(header).encode("utf-8", "replace")
    stated = draw(st.sampled_from((len(text),) * 4 + LENGTHS))
    return struct.pack("<Q", stated) + text + data


@st.composite
def attacks(draw: st.DrawFn) -> tuple[str, Any]:
    """Which file, and what is to be done to its bytes; the bytes are known only once a run is there."""
    name = draw(st.sampled_from(JSON + TENSORS + OTHER))
    kind = draw(st.sampled_from(("bytes", "nodes", "nodes") if name not in OTHER else ("bytes",)))
    return name, kind


@fuzz(attack=attacks(), command=st.sampled_from(COMMANDS), data=st.data())
def test_artifacts(photos: Path, whole: Path, attack: tuple[str, str], command: tuple[str, ...], data: Any) -> None:
    name, kind = attack
    content = (whole / name).read_bytes()
    odd = data.draw(damaged(content) if kind == "bytes" else described(name, content))
    run = photos / "run"
    fresh(run, whole)
    (run / name).write_bytes(odd)
    write_config(photos, **{**PHOTOS, "forget": {"samples": "delete.csv"}})
    try:
        call(*command, "-c", photos / "megu.yaml", user=photos, run=run, writes=command in WRITES)
    finally:
        fresh(run)


@fuzz(attack=attacks(), data=st.data())
def test_reading_an_artifact(photos: Path, whole: Path, attack: tuple[str, str], data: Any) -> None:
    name, kind = attack
    if name in OTHER:
        return
    content = (whole / name).read_bytes()
    path = photos / f"odd-{name}"
    path.write_bytes(data.draw(damaged(content) if kind == "bytes" else described(name, content)))
    for function in (artifacts.read_meta, artifacts.read, artifacts.is_ours):
        with expected_errors():
            function(path)
    path.unlink()
