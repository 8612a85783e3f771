"""Artifacts: files that describe themselves, are whole or absent, and are checked when read.

An artifact is a JSON body plus, in a ``.safetensors`` file, named tensors. It carries its own ``meta``: stage,
fingerprint with its parts, lineage and content digest; in JSON under the key ``meta``, in safetensors as one
metadata key ``megu`` holding canonical JSON. So the artifact is the cache entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megu_cli.errors import ArtifactError

if TYPE_CHECKING:
    import torch

FORMAT = 1
_NO_TENSORS = hashlib.sha256().hexdigest()
_TEMPORARY = ".megu-tmp-"
_LOCK = ".lock"
# Of what `parts` records: bytes of the head, and the number of parts.
_HEAD, _PARTS = 64, 16
# Folders that megu writes in a run directory.
_FOLDERS = ("model", "compare")


class ForeignFileError(ArtifactError):
    """A whole file that stands where an artifact should, and is not megu's: it must not be replaced."""


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


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def tensor_digest(path: Path) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors in a safetensors file, in order of name.

    It does not depend on the order in which a writer laid them out, nor on the file's metadata.

    Raises:
        ArtifactError: The file is no whole safetensors file.
    """
    with path.open("rb") as stream:
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
    """Write tensors as safetensors; tied ones are written out one by one."""
    import safetensors.torch

    safetensors.torch.save_file(_separate(tensors), path, metadata=metadata)
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


def read_meta(path: Path) -> dict[str, Any]:
    """Verify an artifact's content digest and return its meta, without torch.

    Raises:
        ArtifactError: The file is missing, no artifact of ours, damaged, or of a newer format.
    """
    body, meta = _read_description(path)
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

    return Artifact(body, safetensors.torch.load_file(path), meta)


def metadata(path: Path) -> dict[str, Any]:
    """The metadata in the header of a safetensors file.

    Raises:
        OSError: The file cannot be opened.
        ArtifactError: It is no whole safetensors file.
    """
    with path.open("rb") as stream:
        found = _header(stream, path.name)[0].get("__metadata__", {})
    return found if isinstance(found, dict) else {}


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
        if path.suffix == ".json":
            body = json.loads(path.read_text(encoding="utf-8"))
            if "meta" not in body:
                raise _foreign(path)
            meta = body.pop("meta")
        else:
            with path.open("rb") as stream:
                header, _ = _header(stream, path.name)
            if "megu" not in header.get("__metadata__", {}):
                raise _foreign(path)
            described = json.loads(header["__metadata__"]["megu"])
            body, meta = described["body"], described["meta"]
        written = meta["format"]
    except FileNotFoundError:
        raise ArtifactError(f"{path.name} is not there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path.name} is damaged, or was not written by megu") from None
    if written != FORMAT:
        raise ArtifactError(
            f"{path.name} has format {written}; this megu reads format {FORMAT}",
            "Rebuild it, or change the version.",
        )
    return body, meta


def _foreign(path: Path) -> ForeignFileError:
    return ForeignFileError(
        f"{path} was not written by megu and would be replaced",
        "Move it elsewhere (trained weights are named by model.checkpoint), or give another directory with -o.",
    )


def _linked(path: Path) -> ForeignFileError:
    return ForeignFileError(
        f"{path} is a symbolic link, and megu writes through none",
        "Remove the link, or give another directory with -o.",
    )


def _header(stream: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and where its data start."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if 8 + length > size:
        raise ArtifactError(f"{name} is truncated, or no safetensors file")
    try:
        header = json.loads(stream.read(length))
        end = max((info["data_offsets"][1] for key, info in header.items() if key != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{name} is no safetensors file") from None
    if 8 + length + end != size:
        raise ArtifactError(f"{name} is truncated")
    return header, 8 + length


def parts(path: Path) -> dict[str, Any]:
    """What recognises a file when it is met again, also where it was damaged: its size and digests of its parts."""
    size = path.stat().st_size
    with path.open("rb") as stream:
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
            with path.open("rb") as stream:
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
    with path.open("rb") as stream:
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
    with path.open("rb") as stream:
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
    content = path.read_bytes()
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content.startswith(b'{\n "')  # the layout of ours, cut off or damaged
    meta = body.get("meta", body) if isinstance(body, dict) else None
    # An artifact, or a report.
    return isinstance(meta, dict) and ({"checksum", "content"} <= meta.keys() or {"megu", "sections"} <= meta.keys())


def _log_of_ours(path: Path) -> bool:
    """Whether any line is an entry of runs.jsonl or an answer; a single line that was cut must begin like one."""
    content = path.read_bytes()
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            name = "key" if path.name.startswith("similarity") else "fingerprint"
            if isinstance(entry, dict) and re.fullmatch("[0-9a-f]{64}", str(entry.get(name))):
                return True
            if line == content.rstrip(b"\n"):
                return False
    return b"\n" not in content and content.startswith((b'{"time": "', b'{"stage": "', b'{"key": "'))


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
            raise _linked(link)
    try:
        if not path.exists():
            return
        ours = path.is_file() and (
            not path.stat().st_size or marked(path) or any(recognised(path, record) for record in records)
        )
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from None
    if not ours:
        raise _foreign(path)


def within(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, lies in a folder."""
    return path.resolve().is_relative_to(folder.resolve())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place, synced to disk, when the block ends well.

    The file's mode follows the umask, whatever the writer makes of it.

    Raises:
        ArtifactError: The folder cannot be written, or ``path`` is a symbolic link.
    """
    if path.is_symlink():
        raise _linked(path)
    try:
        with _temporary(path) as temporary:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode & 0o777)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one writer of a run directory; leftovers of a killed one are swept.

    The lock file goes with the lock, and so does the directory where it was made for nothing.

    Raises:
        ArtifactError: The directory cannot be written, or another process writes to it.
    """
    import filelock

    # What fails in the body is another's fault, and is not told as the directory's.
    file = folder / _LOCK
    lock = filelock.FileLock(file, timeout=0)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        while not _holds(lock, file):  # its last holder deleted the file between our opening and locking it
            lock.release()
            lock.acquire()
        for leftover in _leftovers(folder):
            leftover.unlink(missing_ok=True)
    except filelock.Timeout:
        raise ArtifactError(
            f"another megu process is writing to {folder}",
            "Wait for it to end, or give another directory with -o.",
        ) from None
    except OSError as error:
        lock.release()
        raise ArtifactError(
            f"the run directory {folder} cannot be written: {error.strerror or error}",
            "Give another with -o DIR.",
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)  # while it is held: whoever opened it before sees in `_holds` that it is gone
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _holds(lock: Any, file: Path) -> bool:
    """True if the file that is locked is still the one in the directory."""
    try:
        own, there = os.fstat(lock._context.lock_file_fd), file.stat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _leftovers(folder: Path, nested: bool = False) -> Iterator[Path]:
    """Temporary files in a run directory and where megu writes below it, but not in a run directory of its own."""
    if nested and (folder / _LOCK).exists():
        return
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if nested or path.name in _FOLDERS:
                yield from _leftovers(path, nested=True)
        elif path.name.startswith(_TEMPORARY):
            yield path
