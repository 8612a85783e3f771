"""What an unlearned file or directory says of itself, and how its weights are recognised without that."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megu_cli.errors import ArtifactError
from megu_cli.models.checkpoints import content_of, is_tensor, mappings
from megu_cli.run import artifacts

# Where an unlearned file says what was forgotten (`earlier.provenance`): in the metadata of safetensors, and as a file
# in the archive that torch.save writes, beside its pickle. The keys of the state dict stay as they are.
MARK = "megu_unlearned"
# The same in config.json of a directory.
MARK_IN_CONFIG = "megu"


def marked(content: bytes, mark: str) -> bytes:
    """A file of ``torch.save`` with a mark in its archive, which ``torch.load`` does not read."""
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{MARK}.json"), mark)  # with a date of its own: 1980
    return stream.getvalue()


def mark_of(path: Path) -> str | None:
    """The mark of an unlearned file or directory, as it stands there; ``None``: there is none."""
    if path.is_dir():
        try:
            with artifacts.opened(path / "config.json") as stream:
                config = json.loads(stream.read())
        except (OSError, ValueError, RecursionError, ArtifactError):
            config = None
        if isinstance(config, dict) and MARK_IN_CONFIG in config:
            return json.dumps(config[MARK_IN_CONFIG])
        return mark_of(path / "model.safetensors")
    if path.suffix == ".safetensors":
        try:
            mark = artifacts.metadata(path).get(MARK)
        except (OSError, ArtifactError):
            return None
        return mark if mark is None or isinstance(mark, str) else ""
    name = None
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/{MARK}.json")), None)
            # As it was written: what is compressed may be of any size.
            plain = name is not None and archive.getinfo(name).compress_type == zipfile.ZIP_STORED
            return archive.read(name).decode() if name and plain else name and ""
    except (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile):
        return name and ""  # a mark that cannot be read is one


def weights_digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of a set of tensors, by whichever names and in whichever order; scalars, such as counters, do not count.

    Copies count once, so that tied weights may be written once or twice.
    """
    plain = (t for t in tensors if t.ndim and t.layout is torch.strided and not (t.is_quantized or t.is_meta))
    return artifacts.digest(sorted({_tensor_digest(t) for t in plain}))


def _tensor_digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{values.dtype} {list(values.shape)}".encode())
    total.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def weights_digests(path: Path) -> set[str]:
    """The `weights_digest` of each mapping in a checkpoint file, or of all weights in a directory.

    Raises:
        CheckpointError: It cannot be read.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return {weights_digest(tensor for file in files for tensor in content_of(file).values() if is_tensor(tensor))}
    return {weights_digest(filter(is_tensor, mapping.values())) for _, mapping in mappings(content_of(path))}
