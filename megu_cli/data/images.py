"""Images in memory or streamed from disk behind one interface, and the splits and data sets made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Images(Protocol):
    """Images of one split: uint8 pixels, by position."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, position: int) -> Tensor:
        """The image at a position: uint8 (C, H, W)."""

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """One uint8 tensor (B, C, H, W) for each tensor of positions in ``order``."""

    def at(self, index: Tensor) -> Images:
        """The images at ``index`` alone."""


class MemoryImages:
    """Images that fit in memory: one uint8 tensor (N, C, H, W)."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> Tensor:
        return self.pixels[position]

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Images.batches`."""
        return (self.pixels[index] for index in order)

    def at(self, index: Tensor) -> MemoryImages:
        """The images at ``index`` alone."""
        return MemoryImages(self.pixels[index])


class FileImages:
    """Images on disk: decoded as they are asked for, or all at the first use where they are to be kept in memory."""

    def __init__(self, files: Sequence[Path], decode: Callable[[Path], Tensor], workers: int, keep: bool) -> None:
        self.files, self.decode, self.workers, self.keep = files, decode, workers, keep
        self._kept: MemoryImages | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor:
        return self.decode(self.files[position])

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Images.batches`."""
        if not self.keep:
            return self._decoded(order)
        if self._kept is None:
            everything = list(torch.arange(len(self)).split(256))
            self._kept = MemoryImages(torch.cat(list(self._decoded(everything))))
        return self._kept.batches(order)

    def at(self, index: Tensor) -> FileImages:
        """The images at ``index`` alone."""
        return FileImages([self.files[i] for i in index.tolist()], self.decode, self.workers, self.keep)

    def _decoded(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        loader: torch.utils.data.DataLoader[Tensor] = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=[index.tolist() for index in order],
            num_workers=self.workers,
            collate_fn=torch.stack,
        )
        return iter(loader)


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        images: The pixels.
        labels: (N,) int64, the class that the model predicts.
        concepts: (N,) int64, the finest class known; equals ``labels`` where there are no superclasses.
        names: Identity of each sample, such as its relative path.
        mean: (C, 1, 1) for normalisation.
        std: (C, 1, 1) for normalisation.
        digest: sha256 of the content: names, labels and pixels.
    """

    images: Images
    labels: Tensor
    concepts: Tensor
    names: Sequence[str]
    mean: Tensor
    std: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Normalised float32 images (B, C, H, W), channels_last, for each tensor of positions in ``order``."""
        mean, std = self.mean.to(device), self.std.to(device)
        for pixels in self.images.batches(order):
            pixels = pixels.to(device).expand(-1, len(mean), -1, -1)
            yield pixels.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def pass_over(
        self, index: Tensor, size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, images) over ``index`` in its order, ``size`` at a time."""
        order = list(index.split(size))
        return zip(order, self.batches(order, device), strict=True)


@dataclass(frozen=True)
class Dataset:
    """A data set whose classes a model predicts.

    Attributes:
        name: Its name in the config.
        classes: Names of the K classes.
        concepts: Names of the finest classes; equals ``classes`` without superclasses.
        concept_class: (len(concepts),) int64, the class of each concept.
        train: All training images.
        test: Test images.
        validation: (N,) bool over ``train``: held out by hash of identity, never trained on by `megu train`.
        channels: Channels of the images that a model sees.
    """

    name: str
    classes: list[str]
    concepts: list[str]
    concept_class: Tensor
    train: Split
    test: Split
    validation: Tensor

    @property
    def channels(self) -> int:
        """Channels of the images that a model sees."""
        return len(self.train.mean)


@dataclass(frozen=True)
class Raw:
    """What a loader gives: pixels and fine labels of both splits."""

    classes: list[str]
    train: tuple[Images, np.ndarray[Any, Any], Sequence[str]]
    test: tuple[Images, np.ndarray[Any, Any], Sequence[str]]
    digests: tuple[str, str]


def hashed(names: Sequence[str], purpose: str) -> np.ndarray[Any, Any]:
    """A number in [0, 1) for each name that depends on nothing but the name and the purpose."""
    digests = b"".join(hashlib.sha256(f"{purpose}/{name}".encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, dtype=">u8") / 2.0**64
