"""Data sets of one's own: images in folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megu_cli.data.images import FileImages, Raw
from megu_cli.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def imagefolder(
    root: Path | None,
    size: int | None,
    memory_limit: float,
    workers: int,
    channels: int | None,
    file_digests: Callable[[Sequence[Path]], list[str]],
) -> Raw:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``."""
    if root is None or size is None:
        raise DataError("data.name: imagefolder needs data.root and data.image_size")
    folders = {split: root / split for split in ("train", "test")}
    for folder in folders.values():
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder", "An imagefolder has train/CLASS/ and test/CLASS/ in data.root.")
    classes = sorted(d.name for d in folders["train"].iterdir() if d.is_dir())
    unknown = sorted({d.name for d in folders["test"].iterdir() if d.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{folders['test']}: classes without training images: {', '.join(unknown)}")

    def decode(path: Path) -> Tensor:
        return _decode(path, size, channels or 3)

    parts, digests = [], []
    for split, folder in folders.items():
        files, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files += found
            labels += [label] * len(found)
        if not files:
            raise DataError(f"{folder} holds no images")
        names = [f"{split}/{path.relative_to(folder).as_posix()}" for path in files]
        rows = list(zip(names, labels, file_digests(files), strict=True))
        digests.append(hashlib.sha256(repr((rows, size)).encode()).hexdigest())
        fits = len(files) * (channels or 3) * size * size <= memory_limit * 2**30
        parts.append((FileImages(files, decode, workers, keep=fits), np.array(labels), names))
    return Raw(classes, parts[0], parts[1], (digests[0], digests[1]))


def read_digests(files: Sequence[Path]) -> list[str]:
    """sha256 of each file."""
    from megu_cli.artifacts import file_digest

    return [file_digest(path) for path in files]


def _decode(path: Path, size: int, channels: int) -> Tensor:
    """An image file as a uint8 tensor (C, size, size): shorter side resized, then the centre cut out.

    Raises:
        DataError: The file is no image that can be decoded whole.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it")
        raise DataError(f"{path} cannot be decoded: {reason}", "Repair it or take it out of the folder.") from None
    array = np.asarray(square, dtype=np.uint8).copy()
    return torch.from_numpy(array.reshape(size, size, -1)).permute(2, 0, 1)
