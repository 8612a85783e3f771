"""The splits of a data set: training images, held-out images, test images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megu_cli.data.images import Images, Joined, Selected
from megu_cli.data.names import chained, picked


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        images: The pixels, red, green, blue or grey.
        labels: (N,) int64, the class that the model predicts.
        concepts: (N,) int64, the finest class known; equals ``labels`` where there are no superclasses.
        names: Identity of each sample, such as its relative path.
        mean: (C, 1, 1) for normalisation, in the order in which the model takes the channels.
        std: (C, 1, 1) for normalisation, likewise.
        digest: sha256 of the content: names, labels and pixels.
        subjects: (N,) int64, whose image each is, as a position in the data set's subjects; -1 where nobody's.
        bgr: The model takes blue, green, red.
    """

    images: Images
    labels: Tensor
    concepts: Tensor
    names: Sequence[str]
    mean: Tensor
    std: Tensor
    digest: str
    subjects: Tensor | None = None
    bgr: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> Split:
        """The images at ``index`` alone, with all that is known of them."""
        return replace(self._described(index), images=self.images.at(index))

    def view(self, index: Tensor) -> Split:
        """The images at ``index`` alone, as `at` gives them; the pixels are not copied."""
        return replace(self._described(index), images=Selected(self.images, index))

    def _described(self, index: Tensor) -> Split:
        """All but the images at ``index``."""
        chosen = index.numpy()
        return replace(
            self,
            labels=self.labels[index],
            concepts=self.concepts[index],
            names=picked(self.names, chosen),
            digest=hashlib.sha256(self.digest.encode() + chosen.tobytes()).hexdigest(),
            subjects=None if self.subjects is None else self.subjects[index],
        )

    def followed_by(self, other: Split) -> Split:
        """The images of this split and then those of another one with the same normalisation; nothing is copied."""
        subjects = None
        if self.subjects is not None and other.subjects is not None:
            subjects = torch.cat([self.subjects, other.subjects])
        return replace(
            self,
            images=Joined(self.images, other.images),
            labels=torch.cat([self.labels, other.labels]),
            concepts=torch.cat([self.concepts, other.concepts]),
            names=chained(self.names, other.names),
            digest=hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest(),
            subjects=subjects,
        )

    def batches(self, order: Sequence[Tensor], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Normalised float32 images (B, C, H, W), channels_last, for each tensor of positions in ``order``."""
        mean, std = self.mean.to(device), self.std.to(device)
        for pixels in self.images.batches(order):
            pixels = ordered(pixels.to(device), self.bgr).expand(-1, len(mean), -1, -1)
            yield pixels.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def pass_over(
        self, index: Tensor, size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, images) over ``index`` in its order, ``size`` at a time."""
        order = list(index.split(size))
        return zip(order, self.batches(order, device), strict=True)


def ordered(pixels: Tensor, bgr: bool) -> Tensor:
    """Images (B, C, H, W) of red, green, blue in the order in which a model takes them; grey ones stay as they are."""
    return pixels.flip(1) if bgr else pixels


@dataclass(frozen=True)
class Dataset:
    """A data set whose classes a model predicts.

    The held-out images are a part of the training images, or images that have left the test split. The training split
    has every training image in the order of the data set: deletion lists, requests and artifacts hold positions in it,
    and these do not depend on which images are held out. A training uses `trainable` ones only.

    Attributes:
        name: Its name in the config.
        classes: Names of the K classes.
        concepts: Names of the finest classes; equals ``classes`` without superclasses.
        concept_class: (len(concepts),) int64, the class of each concept.
        train: Training images.
        held_out: Held-out images, on which nothing trains: they select, and they show a model's answers on unseen data.
        test: Test images.
        withheld: (len(held_out),) int64 positions of the held-out images in ``train``; empty if they come from the test
            split.
        subjects: Ids of the people, or other subjects, whose images these are; empty where that is not known.
        test_made: The data came without a test split, and it was made here.
        root: The folder that names of images are relative to; ``None`` where they are no paths.
        digest: Content digest of the training images and of the held-out images that come from the test split.
    """

    name: str
    classes: list[str]
    concepts: list[str]
    concept_class: Tensor
    train: Split
    held_out: Split
    test: Split
    withheld: Tensor
    subjects: Sequence[str] = ()
    test_made: bool = False
    root: Path | None = None
    digest: str = ""

    @property
    def trainable(self) -> Tensor:
        """(len(train),) bool: training images that are not held out."""
        free = torch.ones(len(self.train), dtype=torch.bool)
        free[self.withheld] = False
        return free

    @property
    def borrowed(self) -> int:
        """Number of held-out images that come from the test split."""
        return len(self.held_out) - len(self.withheld)

    @property
    def channels(self) -> int:
        """Channels of the images that a model sees."""
        return len(self.train.mean)

    def withholding(self, positions: Tensor) -> Dataset:
        """The data set with these training images held out, and no others."""
        return replace(self, held_out=self.train.view(positions), withheld=positions)

    def held_out_among(self, train: Tensor) -> Tensor:
        """(len(held_out),) bool: the held-out images that are training images at these positions."""
        if self.borrowed:
            return torch.zeros(len(self.held_out), dtype=torch.bool)
        return torch.isin(self.withheld, train)
