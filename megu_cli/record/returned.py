"""The search for forgotten images that came back: byte copies by digest, resized and re-encoded ones by their look."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megu_cli.data.decode import IMAGE_SUFFIXES, picture
from megu_cli.errors import ArtifactError, DataError
from megu_cli.execution.runtime import Track, silent
from megu_cli.record import collect, envelope, fingerprints
from megu_cli.record.verify import statement_of
from megu_cli.run import artifacts, files, reading

if TYPE_CHECKING:
    from PIL import Image

# How far apart the perceptual hashes of two copies of an image may be: see docs/records.md.
FARTHEST = 0.22
# A larger file is no image: its bytes are compared, and it is not decoded.
_LARGEST = 256 * 1024 * 1024


@dataclass(frozen=True)
class Known:
    """What is known of the forgotten images.

    Attributes:
        digests: Of their files or pixels, each of ``digits`` hexadecimal digits; salted where there is a salt.
        digits: Length of a digest before it is salted.
        pixels: Whether the digests are those of pixels.
        salt: Of the digests; ``None``: they are not salted.
        looks: (N, 32) uint8, perceptual hashes.
        notes: What cannot be found with it, and why.
    """

    digests: frozenset[str]
    digits: int = fingerprints.DIGITS
    pixels: bool = False
    salt: bytes | None = None
    looks: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 32), np.uint8))
    notes: tuple[str, ...] = ()

    def holds(self, digest: str) -> bool:
        """True if the digest is one of a forgotten image."""
        own = digest[: self.digits]
        return (own if self.salt is None else collect.salted(self.salt, f"image:{own}")) in self.digests


@dataclass(frozen=True)
class Found:
    """A file that a forgotten image came back in."""

    file: str
    how: str


@dataclass
class Search:
    """What a search gave: the files found, how many were looked at, and image files that cannot be decoded."""

    found: list[Found] = field(default_factory=list)
    files: int = 0
    undecodable: list[str] = field(default_factory=list)


def of_run(out: Path) -> Known:
    """What a run directory knows of the images that it forgot.

    Raises:
        ArtifactError: It holds no finished run, or neither digests nor perceptual hashes.
    """
    try:
        stored = fingerprints.read(out)["fingerprints"]
    except ArtifactError:
        if (out / fingerprints.FILE).exists():
            raise
        stored = {}
    if stored:
        notes = () if "lookalikes" in stored else (_NO_LOOKS,)
        return Known(
            frozenset(stored["images"]),
            pixels=stored["of"] == "pixels",
            looks=_looks(stored.get("lookalikes", [])),
            notes=notes,
        )
    # What finetune.json says of single images, so that a later request keeps them forgotten.
    images = artifacts.read(out / files.FINETUNE).body.get("forgotten", {}).get("images", [])
    if not images:
        raise ArtifactError(
            f"{out} does not know which images it forgot: record.fingerprints is none, or the run is older",
            "Set record.fingerprints to bytes or lookalikes, and `megu run` again while the images are there.",
        )
    return Known(frozenset(images), digits=16, notes=(_NO_LOOKS,))


def of_record(file: Path, salt: bytes | None) -> Known:
    """What a record knows of the images that were forgotten.

    Raises:
        ArtifactError: It is no record, or holds neither digests that can be compared nor perceptual hashes.
    """
    predicate = statement_of(envelope.read(file)).predicate
    forgotten, notes = predicate.forgotten, []
    if salt is not None and predicate.salt.check != collect.check_of(salt):
        raise ArtifactError("the salt is not the one of this record", "Name the right one with --salt.")
    if salt is None:
        notes.append("byte copies are not looked for: the record's digests are salted, name the salt with --salt")
    if not forgotten.lookalikes:
        notes.append(_NO_LOOKS)
    if not forgotten.lookalikes and (salt is None or not forgotten.image_digests):
        raise ArtifactError(f"{file} has nothing to look for: {'; '.join(notes)}")
    digests = frozenset(forgotten.image_digests if salt is not None else [])
    return Known(
        digests, pixels=forgotten.of == "pixels", salt=salt, looks=_looks(forgotten.lookalikes), notes=tuple(notes)
    )


_NO_LOOKS = "resized and re-encoded copies are not looked for: record.fingerprints was not lookalikes"


def _looks(hashes: list[str]) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, fingerprints.SIDE**2 // 8)


def search(folder: Path, known: Known, farthest: float = FARTHEST, track: Track = silent) -> Search:
    """Look at every file below a folder; links are not followed.

    Args:
        folder: Any folder.
        known: What is known of the forgotten images.
        farthest: How far apart perceptual hashes may be, from 0 to 1.
        track: Reports progress.
    """
    paths = list(_files(folder))
    result = Search(files=len(paths))
    with track("check", len(paths)) as advance:
        for path in paths:
            name = path.relative_to(folder).as_posix()
            try:
                if how := _how(path, known, farthest):
                    result.found.append(Found(name, how))
            except (OSError, DataError):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    result.undecodable.append(name)
            advance()
    return result


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(root, name)).is_file() and not path.is_symlink())


def _how(path: Path, known: Known, farthest: float) -> str:
    """How a file equals a forgotten image; empty: it does not.

    Raises:
        OSError: It cannot be read.
        DataError: It is no image that can be decoded.
    """
    if path.stat().st_size > _LARGEST:
        return "the same bytes" if not known.pixels and known.holds(artifacts.file_digest(path)) else ""
    content = reading.content(path)
    if not known.pixels and known.holds(fingerprints.bytes_digest(content)):
        return "the same bytes"
    if known.pixels and any(map(known.holds, fingerprints.picture_digests(picture(path.name, content)))):
        return "the same pixels"
    if not len(known.looks):
        return ""
    return alike(picture(path.name, content, fingerprints.ENOUGH), known, farthest)


def alike(image: Image.Image, known: Known, farthest: float = FARTHEST) -> str:
    """How far an image looks from the nearest forgotten one, in words; empty: farther than ``farthest``."""
    look = fingerprints.look(image)
    apart = None if look is None else fingerprints.difference(known.looks, look)
    return "" if apart is None or apart > farthest else f"looks alike: {apart:.0%} of the bits differ"
