"""Load a data set by name: its pixels, classes, superclasses, normalisation and held-out sample."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megu_cli.data.builtin import CIFAR20, LOADERS, resized
from megu_cli.data.folders import imagefolder, read_digests
from megu_cli.data.images import Dataset, Split, hashed
from megu_cli.errors import DataError

_GRAY = ((0.5,), (0.5,))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
NORMALISATION = {
    "digits": ((0.3,), (0.37,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": _CIFAR,
    "cifar20": _CIFAR,
    "cifar100": _CIFAR,
    "imagefolder": _IMAGENET,
}


def load(
    name: str,
    *,
    root: Path | None = None,
    superclasses: dict[str, list[str]] | None = None,
    validation: float = 0.05,
    limit: int | None = None,
    image_size: int | None = None,
    memory_limit: float = 2.0,
    workers: int = 0,
    channels: int | None = None,
    file_digests: Callable[[Sequence[Path]], list[str]] | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        name: A name of the config's ``data.name``.
        root: Where the files are, or are downloaded to.
        superclasses: Superclass name to its member classes; every class belongs to exactly one.
        validation: Share of the training images held out.
        limit: Number of training images to use.
        image_size: Side in pixels to resize to.
        memory_limit: GiB of decoded images to keep in memory.
        workers: Processes that decode streamed images.
        channels: Channels that the model takes; grey images are repeated.
        file_digests: sha256 of each file, for instance from a memo; the default reads them.

    Raises:
        DataError: The files are missing or damaged, or the superclasses do not fit.
    """
    if name == "imagefolder":
        raw = imagefolder(root, image_size, memory_limit, workers, channels, file_digests or read_digests)
    else:
        raw = LOADERS[name](root)
        if image_size:
            raw = resized(raw, image_size)
    if name == "cifar20" and superclasses is None:
        superclasses = CIFAR20
    classes, concept_class = _coarse(raw.classes, superclasses)

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in NORMALISATION[name])
    wanted = channels or len(mean)
    if len(mean) == 1 < wanted:
        mean, std = mean.expand(wanted, 1, 1), std.expand(wanted, 1, 1)
    if len(mean) != wanted:
        raise DataError(
            f"the model takes {wanted}-channel images, {name} has {len(mean)}",
            "Choose another model.name; grey images can be repeated, colours cannot be dropped.",
        )

    splits = []
    for (images, fine, names), content in zip((raw.train, raw.test), raw.digests, strict=True):
        concepts = torch.as_tensor(fine, dtype=torch.int64)
        digest = hashlib.sha256(repr((raw.classes, classes, superclasses, content)).encode()).hexdigest()
        splits.append(Split(images, concept_class[concepts], concepts, names, mean, std, digest))
    train, test = splits
    if limit is not None and limit < len(train):
        train = _limited(train, limit)
    held_out = torch.from_numpy(hashed(train.names, "validation") < validation)
    return Dataset(name, classes, raw.classes, concept_class, train, test, held_out)


def sampled(split: Split, positions: Sequence[int], number: int) -> list[int]:
    """Up to ``number`` of ``positions``, chosen by hash of the images' identity: the same ones whatever the seed."""
    rank = hashed([split.names[i] for i in positions], "similarity")
    return [positions[i] for i in np.argsort(rank, kind="stable")[:number]]


def _limited(split: Split, limit: int) -> Split:
    keep = np.sort(np.argsort(hashed(split.names, "limit"), kind="stable")[:limit])
    index = torch.from_numpy(keep)
    images = split.images.at(index)
    names = [split.names[i] for i in keep]
    digest = hashlib.sha256(f"{split.digest} {limit}".encode()).hexdigest()
    return Split(images, split.labels[index], split.concepts[index], names, split.mean, split.std, digest)


def _coarse(fine: list[str], superclasses: dict[str, list[str]] | None) -> tuple[list[str], Tensor]:
    """Class names of the model, and the class of each fine class.

    Raises:
        DataError: A member is unknown, a class is in none or in two superclasses.
    """
    if superclasses is None:
        return fine, torch.arange(len(fine))
    faults = [f"{m!r} is no class" for m in itertools.chain(*superclasses.values()) if m not in fine]
    owner = {name: [s for s, members in superclasses.items() if name in members] for name in fine}
    faults += [
        f"{name!r} is in {len(o) or 'no'} superclass{'es' if o else ''}" for name, o in owner.items() if len(o) != 1
    ]
    if faults:
        raise DataError(f"data.superclasses: {'; '.join(faults)}", f"The classes are: {', '.join(fine)}.")
    names = list(superclasses)
    return names, torch.tensor([names.index(owner[name][0]) for name in fine])
