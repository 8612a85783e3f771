"""Artifacts: files that describe themselves, are whole or absent, and are checked when read.

An artifact is a JSON body plus, in a ``.safetensors`` file, named tensors. It carries its own ``meta``: stage,
fingerprint with its parts, lineage and content digest; in JSON under the key ``meta``, in safetensors as one
metadata key ``megu`` holding canonical JSON. So the artifact is the cache entry.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megu_cli.errors import ArtifactError, ForeignFileError, brief
from megu_cli.run import reading
from megu_cli.run.writing import replacing

if TYPE_CHECKING:
    import torch

FORMAT = 1
_NO_TENSORS = hashlib.sha256().hexdigest()
# Bits of a number in a safetensors file.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
# Bytes of a safetensors header, and levels of nested JSON, above which a file is not read.
_LARGEST_HEADER = 100_000_000
_DEEPEST = 64
# What a key is made of, and where it comes from: in the meta of every pipeline artifact.
STAGE_KEYS = ("version", "settings", "inputs", "lineage")


@dataclass(frozen=True)
class Artifact:
    """What a stage writes and the next one reads.

    Attributes:
        body: JSON data.
        tensors: Named tensors; empty for a ``.json`` artifact.
        meta: Where it comes from; empty until it is written.
    """

    body: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The content digest that was recorded when the artifact was written."""
        return str(self.meta["content"])


def canonical(data: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal data give equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(data: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(canonical(data)).hexdigest()


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that `canonical` can write again: finite numbers, valid text, at most 64 levels deep, no key twice.

    Raises:
        ValueError: The text is something else.
    """
    try:
        data = json.loads(text, parse_constant=_no_number, parse_int=_whole, object_pairs_hook=_once)
        level, depth = [data], 0
        while level := [item for value in level for item in _items(value)]:
            depth += 1
            if depth > _DEEPEST:
                raise ValueError("it is nested too deeply")
        canonical(data)  # an infinite number or a half character
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None
    return data


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _whole(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"it holds a number of {len(text):,} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {brief(twice)} stands there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file that may be an artifact, opened for reading.

    Raises:
        ArtifactError: It is no regular file.
        OSError: It is not there, or cannot be read.
    """
    try:
        with reading.opened(path) as stream:
            yield stream
    except reading.NoRegularFileError:
        raise ArtifactError(f"{path.name} is no regular file") from None


def file_digest(path: Path) -> str:
    """sha256 of a regular file's bytes."""
    total = hashlib.sha256()
    with opened(path) as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def tensor_digest(path: Path) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors in a safetensors file, in order of name.

    It does not depend on the order in which a writer laid them out, nor on the file's metadata.

    Raises:
        ArtifactError: The file is no whole safetensors file.
    """
    with opened(path) as stream:
        return _stream_digest(stream, path.name)


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """The `tensor_digest` that a state dict would have as a safetensors file."""
    import safetensors.torch

    return _stream_digest(io.BytesIO(safetensors.torch.save(_separate(state))), "state dict")


def _stream_digest(stream: BinaryIO, name: str) -> str:
    header, start = _header(stream, name)
    total = hashlib.sha256()
    for key in sorted(header):
        if key != "__metadata__":
            first, last = header[key]["data_offsets"]
            total.update(canonical([key, header[key]["dtype"], header[key]["shape"]]))
            stream.seek(start + first)
            total.update(stream.read(last - first))
    return total.hexdigest()


def write(path: Path, artifact: Artifact) -> None:
    """Write an artifact whole, or not at all.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    with replacing(path) as temporary:
        save(temporary, artifact)


def save(path: Path, artifact: Artifact) -> None:
    """Write an artifact to a temporary file that `replacing` gave."""
    if path.suffix == ".json":
        document = {**artifact.body, "meta": artifact.meta}
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    else:
        described = canonical({"body": artifact.body, "meta": artifact.meta}).decode()
        save_tensors(path, artifact.tensors, {"megu": described})


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors; tied ones are written out one by one.

    Raises:
        OSError: The file cannot be written.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        safetensors.torch.save_file(_separate(tensors), path, metadata=metadata)
    except SafetensorError as error:  # it has the number of the fault in its text alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found.group(1)) if found else errno.EIO
        raise OSError(number, os.strerror(number)) from None
    if len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: safetensors writes them in another one each time."""
    with path.open("r+b") as stream:
        header, start = _header(stream, path.name)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= start - 8  # nothing but the order is another
        stream.seek(8)
        stream.write(text.ljust(start - 8))


def _separate(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CPU copies that share no memory: safetensors refuses tied tensors."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def seal(artifact: Artifact, meta: dict[str, Any]) -> Artifact:
    """The artifact with ``meta`` and its content digest."""
    tensors = state_digest(artifact.tensors) if artifact.tensors else _NO_TENSORS
    meta = {"format": FORMAT, **meta, "content": _content(artifact.body, tensors)}
    return Artifact(artifact.body, artifact.tensors, {**meta, "checksum": digest(meta)})


def _content(body: dict[str, Any], tensors: str) -> str:
    """Digest of a body and, where there are any, of the tensors."""
    return digest([body] if tensors == _NO_TENSORS else [body, tensors])


def read_meta(path: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Verify an artifact's content digest and return its meta, without torch.

    Args:
        path: The artifact.
        needs: Keys that its meta must have.

    Raises:
        ArtifactError: The file is missing, no artifact of ours, damaged, or of a newer format.
    """
    body, meta = _read_description(path)
    if missing := [key for key in needs if key not in meta]:
        raise ArtifactError(f"{path.name} is damaged: its meta has no {missing[0]}")
    tensors = tensor_digest(path) if path.suffix != ".json" else _NO_TENSORS
    without = {key: value for key, value in meta.items() if key != "checksum"}
    if meta.get("content") != _content(body, tensors) or meta.get("checksum") != digest(without):
        raise ArtifactError(f"{path.name}: it does not match its digest")
    return meta


def read(path: Path) -> Artifact:
    """Read and verify an artifact, tensors included.

    Raises:
        ArtifactError: As `read_meta`.
    """
    meta = read_meta(path)
    body, _ = _read_description(path)
    if path.suffix == ".json":
        return Artifact(body, {}, meta)
    import safetensors.torch

    try:
        return Artifact(body, safetensors.torch.load_file(path), meta)
    except Exception as error:  # safetensors raises its own, and torch more for a dtype that it does not have
        raise ArtifactError(f"{path.name} is damaged: {error}") from None


def check_products(folder: Path, meta: dict[str, Any]) -> None:
    """Compare the files that a stage wrote beside its artifact with what its meta records of them.

    Raises:
        ArtifactError: A file is another, or is no regular file inside the run directory.
        OSError: A file cannot be read.
    """
    for kind, digest_of in (("weights", tensor_digest), ("files", file_digest)):
        for name, recorded in meta.get(kind, {}).items():
            path = folder / name
            if not within(folder, path):
                raise ArtifactError(f"its meta names {name}, a file outside the run directory")
            # A file of another size is not read: what stands there now may be very large.
            if path.stat().st_size != meta.get("sizes", {}).get(name, path.stat().st_size):
                raise ArtifactError(f"{name} does not have its size")
            if digest_of(path) != recorded:
                raise ArtifactError(f"{name} does not match its digest")


def metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        OSError: The file cannot be opened.
        ArtifactError: It is no whole safetensors file.
    """
    with opened(path) as stream:
        found: dict[str, str] = _header(stream, path.name)[0].get("__metadata__", {})
    return found


def is_ours(path: Path) -> bool:
    """Whether a safetensors file is an artifact of megu's, whole or not."""
    try:
        return "megu" in metadata(path)
    except (OSError, ArtifactError):
        return False


def read_body(path: Path) -> dict[str, Any]:
    """The JSON body of an artifact that is known to be whole, without its tensors."""
    return _read_description(path)[0]


def _read_description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with opened(path) as stream:
            described = (
                stream.read() if path.suffix == ".json" else _header(stream, path.name)[0].get("__metadata__", {})
            )
        if isinstance(described, bytes):
            body = strict_json(described)
            if not isinstance(body, dict) or "meta" not in body:
                raise foreign(path)
            meta = body.pop("meta")
        else:
            if "megu" not in described:
                raise foreign(path)
            whole = strict_json(described["megu"])
            body, meta = whole["body"], whole["meta"]
        written = meta["format"]
    except FileNotFoundError:
        raise ArtifactError(f"{path.name} is not there") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path.name} is damaged, or was not written by megu") from None
    if written != FORMAT:
        raise ArtifactError(
            f"{path.name} has format {written}; this megu reads format {FORMAT}",
            "Rebuild it, or change the version.",
        )
    if not isinstance(body, dict) or (fault := _fault(meta)):
        raise ArtifactError(f"{path.name} is damaged: {fault if isinstance(body, dict) else 'its body is no mapping'}")
    return body, meta


def _fault(meta: Any) -> str:
    """What is wrong with the shape of a meta, in words; empty: nothing."""
    if not isinstance(meta, dict):
        return "its meta is no mapping"
    tables = {key: meta.get(key, {}) for key in ("settings", "inputs", "lineage", "weights", "files", "sizes")}
    if wrong := [key for key, value in tables.items() if not isinstance(value, dict)]:
        return f"{wrong[0]} in its meta is no mapping"
    for key in ("inputs", "weights", "files"):
        if not all(isinstance(value, str) for value in tables[key].values()):
            return f"{key} in its meta holds something other than digests"
    if any("\0" in name or not name for name in [*tables["weights"], *tables["files"]]):
        return "its meta names a file that cannot be"
    for name, entry in tables["lineage"].items():
        if not isinstance(entry, dict) or any(key not in entry for key in ("version", "settings", "inputs")):
            return f"{name} in its lineage is incomplete"
        if fault := _fault({"inputs": entry["inputs"], "settings": entry["settings"]}):
            return f"{name} in its lineage: {fault}"
        if not isinstance(entry.get("fingerprint"), str):
            return f"{name} in its lineage has no fingerprint"
    return ""


def foreign(path: Path) -> ForeignFileError:
    """What is said where a file that megu did not write stands in the place of one of megu's."""
    return ForeignFileError(
        f"{path} was not written by megu and would be replaced",
        "Move it elsewhere (trained weights are named by model.checkpoint), or give another directory with -o.",
    )


def _header(stream: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and where its data start."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if 8 + length > size or length > _LARGEST_HEADER:
        raise ArtifactError(f"{name} is truncated, or no safetensors file")
    try:
        header = strict_json(stream.read(length))
        end = _end_of_data(header)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{name} is damaged, or no safetensors file") from None
    if 8 + length + end != size:
        raise ArtifactError(f"{name} is truncated")
    return header, 8 + length


def _end_of_data(header: dict[str, Any]) -> int:
    """Number of bytes of all tensors, which follow each other without gaps.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The header is no header of safetensors.
    """
    if not all(isinstance(value, str) for value in header.get("__metadata__", {}).values()):
        raise ValueError("its metadata are no texts")
    spans = []
    for key, info in header.items():
        if key != "__metadata__":
            first, last = info["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (first, last, *info["shape"])):
                raise ValueError("a size is no natural number")
            if (last - first) * 8 != math.prod(info["shape"]) * _BITS[info["dtype"]]:
                raise ValueError("a tensor does not fill its place")
            spans.append((first, last))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError("tensors overlap, or lie apart")
        end = last
    return end


def within(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, lies in a folder."""
    return path.resolve().is_relative_to(folder.resolve())
