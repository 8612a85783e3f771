"""forgotten.json: what a run forgot, as digests, so that it can be recorded and recognised once the images are gone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megu_cli.errors import ArtifactError
from megu_cli.run import artifacts, files, ownership

if TYPE_CHECKING:
    from PIL import Image

    from megu_cli.config import ForgetConfig
    from megu_cli.data.images import Images
    from megu_cli.pipeline.context import RunContext
    from megu_cli.request.resolve import Request

FILE = files.FINGERPRINTS
# Hexadecimal digits that are stored of an image's sha256.
DIGITS = 32
# A perceptual hash has a bit for each of the lowest SIDE * SIDE frequencies of a thumbnail of THUMBNAIL pixels a side.
SIDE, THUMBNAIL = 16, 64
# Pixels a side of a JPEG that are enough for a perceptual hash.
ENOUGH = 256
# A bit is set where a frequency is stronger than this; below it, encoders leave noise.
_AUDIBLE = 24.0
# An image with fewer bits has no perceptual hash: too many others would look like it.
_FEWEST = 20


def keep(context: RunContext, requests: Sequence[dict[str, Any]] | None = None) -> Path:
    """Write forgotten.json for a finished finetuning, unless it is there.

    Args:
        context: The run.
        requests: What was sent, as `sent` describes it; ``None``: the request of the config.

    Raises:
        ArtifactError: finetune.json cannot be read, or forgotten.json cannot be written.
    """
    path = context.directory.out / FILE
    made = artifacts.read_meta(context.directory.out / files.FINETUNE)
    kind = context.config.record.fingerprints
    requests = [sent(context.config.forget)] if requests is None else list(requests)
    origin = {
        "stage": "forgotten",
        "settings": {"record.fingerprints": kind},
        "inputs": {"finetune": made["content"], "requests": artifacts.digest(requests)},
    }
    if not context.runtime.processes.first or _holds(path, origin):
        return path
    import torch  # `megu run` with nothing to do does not need it

    images, copies = context.inputs.request.forget.tolist(), _copies(context.inputs.request)
    body = {
        "requests": requests,
        "kind": context.inputs.request.section,
        "images": len(images),
        "copies": len(copies),
        "fingerprints": _fingerprints(context.inputs.data.train.images, images, copies, kind),
        "parent": _parent(context),
        "torch": torch.__version__,
    }
    ownership.refuse_foreign(context.directory.out, FILE)
    artifacts.write(path, artifacts.seal(artifacts.Artifact(body), origin))
    return path


def _fingerprints(images: Images, forgotten: Sequence[int], copies: Sequence[int], kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    found: dict[str, Any] = {
        "of": "files" if _encoded(images, forgotten[0]) is not None else "pixels",
        "images": sorted(image_digests(images, forgotten)),
        "copies": sorted(image_digests(images, copies)),
    }
    if kind == "lookalikes":
        found["lookalikes"] = sorted({bits for image in _pictures(images, forgotten) if (bits := look(image))})
    return found


def _holds(path: Path, origin: dict[str, Any]) -> bool:
    try:
        meta = artifacts.read_meta(path)
    except ArtifactError:
        return False
    return all(meta.get(key) == value for key, value in origin.items())


def _copies(request: Request) -> list[int]:
    """Positions of the copies that are forgotten with the images of the request."""
    import torch

    return request.copies[torch.isin(request.copies, request.forget)].tolist()


def sent(forget: ForgetConfig) -> dict[str, Any]:
    """A request as it was sent: the digest of its list, or of what the config names."""
    if forget.samples is not None:
        from megu_cli.request.deletion_list import cells

        number = len(cells(forget.samples))  # first: a list that is not there is refused in its own words
        return {"list": artifacts.file_digest(forget.samples), "items": number}
    named = forget.model_dump(mode="json", include={"classes", "subclasses", "subjects", "random"}, exclude_none=True)
    return {"named": artifacts.digest(named), "items": len(items(forget))}


def items(forget: ForgetConfig) -> list[str]:
    """What a request names: the lines of its list, classes or people; nothing for a draw."""
    if forget.samples is not None:
        from megu_cli.request.deletion_list import cells

        return cells(forget.samples)
    return [str(name) for name in forget.classes or forget.subclasses or forget.subjects or []]


def _parent(context: RunContext) -> dict[str, str]:
    """sha256 of each file of the model that was unlearned, by a name that tells nothing of the user's."""
    parent = context.inputs.original.path
    if not parent.is_dir():
        return {f"checkpoint{parent.suffix}": artifacts.file_digest(parent)} if parent.exists() else {}
    beside = sorted(path for path in parent.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: artifacts.file_digest(path) for path in beside}


def image_digests(images: Images, positions: Sequence[int]) -> Iterator[str]:
    """Start of the sha256 of each image's file, or of its pixels where there is no file."""
    for position in positions:
        content = _encoded(images, position)
        yield pixels_digest(images[position].numpy()) if content is None else bytes_digest(content)


def bytes_digest(content: bytes) -> str:
    """Start of the sha256 of a file."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def pixels_digest(pixels: np.ndarray[Any, Any]) -> str:
    """Start of the sha256 of (C, H, W) uint8 pixels."""
    return bytes_digest(np.ascontiguousarray(pixels).tobytes())


def _pictures(images: Images, positions: Sequence[int]) -> Iterator[Image.Image]:
    from PIL import Image

    from megu_cli.data.decode import picture

    for position in positions:
        content = _encoded(images, position)
        if content is not None:
            yield picture("an image to forget", content, ENOUGH)
        else:
            pixels = images[position].permute(1, 2, 0).numpy()
            yield Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _encoded(images: Images, position: int) -> bytes | None:
    """The bytes of an image's file; ``None`` where the data set has pixels only."""
    from megu_cli.data.images import EncodedImages, Joined

    if isinstance(images, Joined):
        place, before = int(images.order[position]), len(images.first)
        return _encoded(images.first, place) if place < before else _encoded(images.second, place - before)
    return images.source.read(position)[1] if isinstance(images, EncodedImages) else None


def look(image: Image.Image) -> str | None:
    """Perceptual hash: which of the lowest frequencies of the grey thumbnail are strong; 256 bits in hexadecimal.

    ``None``: the image has too few details, and would look like many others.
    """
    import scipy.fft
    from PIL import Image as Pillow

    small = np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Pillow.Resampling.LANCZOS), dtype=np.float64)
    strong = scipy.fft.dctn(small, norm="ortho")[:SIDE, :SIDE] > _AUDIBLE
    strong[0, 0] = False  # the mean
    return np.packbits(strong).tobytes().hex() if strong.sum() >= _FEWEST else None


def read(out: Path) -> dict[str, Any]:
    """The body of a run directory's forgotten.json.

    Raises:
        ArtifactError: It is missing or damaged, or belongs to another finetuning.
    """
    made = artifacts.read_meta(out / files.FINETUNE)
    try:
        meta = artifacts.read_meta(out / FILE)
    except ArtifactError as error:
        raise ArtifactError(error.message, "`megu run` writes it again, as long as the images are there.") from None
    if meta.get("inputs", {}).get("finetune") != made["content"]:
        raise ArtifactError(f"{FILE} belongs to another model than finetune.json", "Write it again with `megu run`.")
    body = artifacts.read_body(out / FILE)
    try:
        _check(body)
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{FILE} is damaged: it does not say what was forgotten") from None
    return body


def _check(body: dict[str, Any]) -> None:
    for key in ("images", "copies", "lookalikes"):
        for digest in body["fingerprints"].get(key, []):
            bytes.fromhex(digest)
    if not all(isinstance(request, dict) for request in body["requests"]) or not isinstance(body["parent"], dict):
        raise ValueError
    _ = int(body["images"]), int(body["copies"]), str(body["kind"]), str(body["torch"])


def difference(known: np.ndarray[Any, Any], found: str) -> float:
    """How far a perceptual hash is from the nearest of (N, 32) uint8 known ones: bits that differ, per bit set in one.

    0: the same. Unrelated images are about 0.6 apart.
    """
    other = np.frombuffer(bytes.fromhex(found), np.uint8)
    differ, together = (np.unpackbits(bits, axis=1).sum(axis=1) for bits in (known ^ other, known | other))
    return float((differ / together).min())


def picture_digests(image: Image.Image) -> list[str]:
    """Digests that an image's pixels would have in a data set of grey or colour images without files."""
    grey = np.asarray(image.convert("L"), dtype=np.uint8)[None]
    colour = np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    return [pixels_digest(grey), pixels_digest(colour)]
