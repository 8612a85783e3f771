"""Images in memory or streamed from disk behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megu_cli.data.names import Names
from megu_cli.errors import DataError, Faults


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

    def contents(self) -> Tensor:
        """(N,) int64 that are equal where images are the same: the start of the sha256 of the file or the pixels."""


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

    def contents(self) -> Tensor:
        """See `Images.contents`."""
        return content_of(hashlib.sha256(image.numpy().tobytes()).digest() for image in self.pixels)


def content_of(digests: Iterable[bytes]) -> Tensor:
    """(N,) int64: the first 8 bytes of each sha256."""
    return torch.from_numpy(np.fromiter((int.from_bytes(d[:8], "big", signed=True) for d in digests), dtype=np.int64))


class Source(Protocol):
    """Image files, by position."""

    def __len__(self) -> int:
        """Number of files."""

    def read(self, position: int) -> tuple[str, bytes]:
        """Name and bytes of a file."""

    def at(self, index: np.ndarray[Any, Any]) -> Source:
        """The files at positions."""


class Files:
    """Files on disk.

    Args:
        root: The folder that the names are relative to.
        names: Relative paths.
    """

    def __init__(self, root: str, names: Names) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> tuple[str, bytes]:
        """See `Source.read`.

        Raises:
            DataError: The file cannot be read.
        """
        path = Path(self.root, self.names[position])
        try:
            return str(path), path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None

    def at(self, index: np.ndarray[Any, Any]) -> Files:
        """See `Source.at`."""
        return Files(self.root, self.names.at(index))


class EncodedImages:
    """Image files: decoded as they are asked for, or all at the first use where they are to be kept in memory.

    Args:
        source: The files.
        decode: Name and bytes of a file -> pixels. Both are sent to other processes where there are workers.
        contents: (N,) int64, what `Images.contents` gives.
        workers: Processes that read and decode.
        keep: Keep what is decoded in memory.
    """

    def __init__(
        self, source: Source, decode: Callable[[str, bytes], Tensor], contents: Tensor, workers: int, keep: bool
    ) -> None:
        self.source, self.decode, self.workers, self.keep = source, decode, workers, keep
        self._contents = contents
        self._kept: MemoryImages | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Tensor:
        return self.decode(*self.source.read(position))

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Images.batches`."""
        if not self.keep:
            return _decoded(self, order, self.workers)
        if self._kept is None:
            self._kept = _all_decoded(self, self.workers)
        return self._kept.batches(order)

    def at(self, index: Tensor) -> EncodedImages:
        """The images at ``index`` alone."""
        source = self.source.at(index.numpy())
        return EncodedImages(source, self.decode, self._contents[index], self.workers, self.keep)

    def contents(self) -> Tensor:
        """See `Images.contents`."""
        return self._contents


class Joined:
    """Images of two rows behind one row of positions. Each stays as it is: in memory, or streamed from disk.

    Args:
        first: Images.
        second: Images of the same size.
        order: (N,) int64, for each position the place in ``first`` followed by ``second``; ``None``: that very order.
    """

    def __init__(self, first: Images, second: Images, order: Tensor | None = None) -> None:
        self.first, self.second = first, second
        self.order = torch.arange(len(first) + len(second)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Tensor:
        place, before = int(self.order[position]), len(self.first)
        return self.first[place] if place < before else self.second[place - before]

    def batches(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `Images.batches`."""
        sides = [self._sides(index) for index in order]
        # A row is asked for nothing but images: a batch without any cannot be stacked.
        first = _asked(self.first, [own for own, other, _ in sides if len(own) or not len(other)])
        second = _asked(self.second, [other for _, other, _ in sides if len(other)])
        for own, other, mine in sides:
            if not len(other):
                yield next(first)
            elif not len(own):
                yield next(second)
            else:
                one, two = next(first), next(second)
                mixed = one.new_empty((len(mine), *one.shape[1:]))
                mixed[mine], mixed[~mine] = one, two
                yield mixed

    def _sides(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions in the first and in the second row, and (len(index),) bool, which of ``index`` are the first's."""
        place = self.order[index]
        mine = place < len(self.first)
        return place[mine], place[~mine] - len(self.first), mine

    def at(self, index: Tensor) -> Joined:
        """The images at ``index`` alone."""
        own, other, mine = self._sides(index)
        order = torch.empty_like(index)
        order[mine], order[~mine] = torch.arange(len(own)), len(own) + torch.arange(len(other))
        return Joined(self.first.at(own), self.second.at(other), order)

    def contents(self) -> Tensor:
        """See `Images.contents`."""
        return torch.cat([self.first.contents(), self.second.contents()])[self.order]


def _asked(images: Images, order: Sequence[Tensor]) -> Iterator[Tensor]:
    # What is to be kept in memory is decoded even if nothing of it is asked for.
    return iter(images.batches(order)) if order else iter(())


class Selected:
    """Images at some positions of other images; nothing is copied or decoded twice.

    Args:
        images: The images.
        index: (N,) int64 positions in them.
    """

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Tensor:
        return self.images[int(self.index[position])]

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Images.batches`."""
        return self.images.batches([self.index[positions] for positions in order])

    def at(self, index: Tensor) -> Images:
        """The images at ``index`` alone."""
        return self.images.at(self.index[index])

    def contents(self) -> Tensor:
        """See `Images.contents`."""
        return self.images.contents()[self.index]


def _all_decoded(images: Images, workers: int) -> MemoryImages:
    """All images decoded.

    Raises:
        DataError: Some cannot be; the first five are named.
    """
    faults = Faults("files cannot be decoded")
    pixels: Tensor | None = None
    order = list(torch.arange(len(images)).split(64))
    for index, (block, messages) in zip(order, _attempts(images, order, workers), strict=True):
        for message in messages:
            faults.add(message)
        if not messages:
            # Filled in place: gathered and then joined, the images would be in memory twice.
            pixels = torch.empty((len(images), *block.shape[1:]), dtype=torch.uint8) if pixels is None else pixels
            pixels[index] = block
    faults.check("Repair them or take them out of the data.")
    assert pixels is not None  # no split is empty
    return MemoryImages(pixels)


def _decoded(images: Images, order: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
    """One uint8 tensor (B, C, H, W) for each tensor of positions, decoded here or by worker processes.

    Raises:
        DataError: A file cannot be decoded.
    """
    for block, messages in _attempts(images, order, workers):
        faults = Faults("files cannot be decoded")
        for message in messages:
            faults.add(message)
        faults.check("Repair them or take them out of the data.")
        yield block


# The images that can be decoded, (B, C, H, W), and messages of those that cannot: errors do not travel well.
_Block = tuple[Tensor, list[str]]


class _Attempts(torch.utils.data.Dataset[_Block]):
    """Batches of images. A batch is put together where it is decoded: a tensor for each image travels slowly."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: Tensor) -> _Block:
        images, messages = [], []
        for position in index.tolist():
            try:
                images.append(self.images[position])
            except DataError as error:
                messages.append(error.message)
        return torch.stack(images) if images else torch.empty(0), messages


def _attempts(images: Images, order: Sequence[Tensor], workers: int) -> Iterator[_Block]:
    attempts = _Attempts(images)
    if not workers:
        return (attempts[index] for index in order)
    loader: torch.utils.data.DataLoader[_Block] = torch.utils.data.DataLoader(
        attempts,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_unchanged,
        # Of its own: by default it would draw from the stream that dropout draws from.
        generator=torch.Generator(),
    )
    return iter(loader)


def _unchanged(block: Any) -> Any:
    return block


@dataclass(frozen=True)
class Part:
    """One split as a loader gives it: images, (N,) fine labels, names, content digest, and (N,) subjects if known."""

    images: Images
    labels: Tensor
    names: Sequence[str]
    digest: str
    subjects: Tensor | None = None


@dataclass(frozen=True)
class Raw:
    """What a loader gives.

    Attributes:
        classes: Names of the fine classes.
        train: The training split.
        test: The test split.
        subjects: Names of the subjects.
        test_made: True if the loader made the test split itself.
        superclasses: Superclass -> its classes, if the data set is a coarse-labelled one.
    """

    classes: list[str]
    train: Part
    test: Part
    subjects: Sequence[str] = ()
    test_made: bool = False
    superclasses: dict[str, list[str]] | None = None
