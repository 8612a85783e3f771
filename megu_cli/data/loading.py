"""Load a data set by name: its pixels, classes, superclasses, normalisation and held-out sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megu_cli.config import DataConfig
from megu_cli.data.builtin import CIFAR20, LOADERS, resized
from megu_cli.data.decode import Preprocessing, Resizing
from megu_cli.data.hub import hf_dataset
from megu_cli.data.images import Raw
from megu_cli.data.names import hashed
from megu_cli.data.own import Reserved, UserData, imagefolder, manifest
from megu_cli.data.splits import Dataset, Split
from megu_cli.errors import DataError, Faults, brief
from megu_cli.run.file_digests import FileDigestCache

# The user's own data sets, by data.name.
USER_DATA: dict[str, Callable[[UserData], Raw]] = {
    "imagefolder": imagefolder,
    "manifest": manifest,
    "hf_dataset": hf_dataset,
}
_GRAY = ((0.5,), (0.5,))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
NORMALISATION = {
    "digits": ((0.3,), (0.37,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": _CIFAR,
    "cifar20": _CIFAR,
    "cifar100": _CIFAR,
    **dict.fromkeys(USER_DATA, _IMAGENET),
}
# Of each class, images that are borrowed from the test split at least: the accuracy on fewer is hardly known.
_FEW = 50
# Nothing that the model says: size and normalisation are those of the data set.
_AS_IT_IS = Preprocessing()
# Data sets of small images of one size, which models take as they are.
SMALL = frozenset(LOADERS)


def load(
    settings: DataConfig,
    prepare: Preprocessing = _AS_IT_IS,
    *,
    channels: int | None = None,
    order: Sequence[str] | None = None,
    reserved: Reserved | None = None,
    file_digests: FileDigestCache | None = None,
) -> Dataset:
    """Load a data set.

    Held-out images come from the test split if ``settings.validation_from`` is ``test``: a model that was trained
    elsewhere has not seen these. A test split that is made here is no such thing: the model may have been trained on
    all of it.

    Args:
        settings: The section ``data`` of the config.
        prepare: Size and normalisation of the images; without a size, ``settings.image_size`` counts.
        channels: Channels that the model takes; grey images are repeated.
        order: Classes of the user's own data in the order of the model's outputs, also those without images; ``None``:
            sorted.
        reserved: Images that never become part of a test split made here.
        file_digests: Remembers digests of files.

    Raises:
        DataError: The files are missing or damaged, or the superclasses do not fit.
    """
    name = settings.name
    if prepare.image_size is None:
        prepare = replace(prepare, image_size=settings.image_size)
    raw = _raw(settings, prepare.resizing, channels, order, reserved or Reserved(), file_digests or FileDigestCache())
    superclasses = settings.superclasses
    if name == "cifar20" and superclasses is None:
        superclasses = CIFAR20
    classes, concept_class = _coarse(raw.classes, superclasses)

    there = len(NORMALISATION[name][0])
    wanted = channels or max(there, len(prepare.mean or ()))
    if there > wanted:
        raise DataError(
            f"the model takes {wanted}-channel images, {name} has {there}",
            "Choose another model.name; grey images can be repeated, colours cannot be dropped.",
        )
    mean, std = NORMALISATION[name]
    means, stds = _per_channel(prepare.mean, mean, wanted), _per_channel(prepare.std, std, wanted)

    splits = []
    for part in (raw.train, raw.test):
        digest = hashlib.sha256(repr((raw.classes, classes, superclasses, part.digest)).encode()).hexdigest()
        labels = concept_class[part.labels]
        splits.append(Split(part.images, labels, part.labels, part.names, means, stds, digest, part.subjects))
    train, test = splits
    if settings.limit is not None and settings.limit < len(train):
        train = _limited(train, settings.limit)
    none = torch.empty(0, dtype=torch.int64)
    data = Dataset(
        name, classes, raw.classes, concept_class, train, train.view(none), test, none, raw.subjects, raw.test_made,
        folder_of(settings), train.digest,
    )  # fmt: skip
    if settings.validation_from == "test" and not raw.test_made:
        return _borrowing(data, settings.validation)
    return holding_out(data, settings.validation)


def _raw(
    settings: DataConfig,
    resizing: Resizing | None,
    channels: int | None,
    order: Sequence[str] | None,
    reserved: Reserved,
    file_digests: FileDigestCache,
) -> Raw:
    """Both splits as a loader gives them."""
    if settings.name in USER_DATA:
        if resizing is None:
            raise DataError(f"data.name: {settings.name} needs data.image_size")
        return USER_DATA[settings.name](UserData(settings, resizing, channels or 3, order, reserved, file_digests))
    raw = LOADERS[settings.name](settings.root)
    return resized(raw, resizing) if resizing else raw


def folder_of(settings: DataConfig) -> Path | None:
    """The folder that the names of images are relative to; ``None`` if they are no paths."""
    if settings.name == "manifest":
        return settings.root or (settings.manifest.parent if settings.manifest else None)
    return settings.root if settings.name == "imagefolder" else None


def holding_out(data: Dataset, share: float) -> Dataset:
    """The data set with a share of its training images held out, chosen by hash of identity."""
    chosen = torch.from_numpy(_identity(data.train, data.subjects, "validation") < share)
    return data.withholding(torch.where(chosen)[0])


def _borrowing(data: Dataset, share: float) -> Dataset:
    """The data set with a part of its test images held out, and no training image.

    They leave the test split. Of each of the finest classes there are as many as ``share`` of its training images, and
    at least 50, but never more than half of its test images; by hash of identity, a person's images all or none (where
    that does not come out even, fewer).

    Args:
        data: The data set, with nothing held out.
        share: From 0 to 1; 0: none.
    """
    train, test = data.train, data.test
    if not share:
        return data
    known, there = (torch.bincount(split.concepts, minlength=len(data.concepts)) for split in (train, test))
    number = torch.minimum((share * known).round().long().clamp_min(_FEW), there // 2)
    # Of each class those are taken whose hash is below that of the first that is not.
    rank = torch.from_numpy(_identity(test, data.subjects, "validation"))
    order = torch.from_numpy(np.lexsort((rank, test.concepts)))
    first = (there.cumsum(0) - there + number)[test.concepts]
    limit = rank[order[first]]
    if test.subjects is not None:
        # A person whose images are of several classes counts where there is least room.
        somebody = test.subjects >= 0
        person = test.subjects[somebody]
        least = torch.ones(len(data.subjects), dtype=torch.float64)
        limit[somebody] = least.scatter_reduce(0, person, limit[somebody], "amin")[person]
    taken = rank < limit
    lent, rest = test.at(torch.where(taken)[0]), test.at(torch.where(~taken)[0])
    if not len(lent):
        return data
    digest = hashlib.sha256(f"{train.digest} {lent.digest}".encode()).hexdigest()
    return replace(data, held_out=lent, test=rest, digest=digest)


def _per_channel(given: Sequence[float] | None, own: Sequence[float], channels: int) -> Tensor:
    """(C, 1, 1) of what is given, else of the data set's own.

    Raises:
        DataError: It is given for another number of channels.
    """
    values = torch.tensor(own if given is None else given).view(-1, 1, 1)
    if len(values) not in (1, channels):
        raise DataError(
            f"a normalisation of {len(values)} channels is given, and the model takes {channels}",
            "Give model.mean and model.std one number, or one for each channel.",
        )
    return values.expand(channels, 1, 1)


def reordered(data: Dataset, order: Sequence[int]) -> Dataset:
    """The data set with its classes in another order.

    Args:
        data: The data set.
        order: (K,) for each new class the position that it had.
    """
    if list(order) == list(range(len(data.classes))):
        return data
    new = torch.empty(len(order), dtype=torch.int64)
    new[torch.tensor(order)] = torch.arange(len(order))
    # Without superclasses, concepts are the classes, and stay so.
    same = data.concepts == data.classes
    classes = [data.classes[old] for old in order]

    def moved(split: Split) -> Split:
        labels = new[split.labels]
        return replace(
            split, labels=labels, concepts=labels if same else split.concepts, digest=moved_digest(split.digest)
        )

    def moved_digest(digest: str) -> str:
        return hashlib.sha256(f"{digest} {new.tolist()}".encode()).hexdigest()

    return replace(
        data,
        classes=classes,
        concepts=classes if same else data.concepts,
        concept_class=torch.arange(len(order)) if same else new[data.concept_class],
        train=moved(data.train),
        held_out=moved(data.held_out),
        test=moved(data.test),
        digest=moved_digest(data.digest),
    )


def _identity(split: Split, people: Sequence[str], purpose: str) -> np.ndarray[Any, Any]:
    """A hash of whose image each is, else of its name: one person's images are all held out, or none."""
    result = hashed(split.names, purpose)
    if split.subjects is not None:
        known = split.subjects.numpy() >= 0
        result[known] = hashed(people, purpose)[split.subjects.numpy()[known]]
    return result


def sampled(split: Split, positions: Sequence[int], number: int) -> list[int]:
    """Up to ``number`` of ``positions``, chosen by hash of the images' identity: the same ones whatever the seed."""
    rank = hashed([split.names[i] for i in positions], "similarity")
    return [positions[i] for i in np.argsort(rank, kind="stable")[:number]]


def _limited(split: Split, limit: int) -> Split:
    keep = np.sort(np.argsort(hashed(split.names, "limit"), kind="stable")[:limit])
    digest = hashlib.sha256(f"{split.digest} {limit}".encode()).hexdigest()
    return replace(split.at(torch.from_numpy(keep)), digest=digest)


def _coarse(fine: list[str], superclasses: dict[str, list[str]] | None) -> tuple[list[str], Tensor]:
    """Class names of the model, and the class of each fine class.

    Raises:
        DataError: A member is unknown, a class is in none or in two superclasses.
    """
    if superclasses is None:
        return fine, torch.arange(len(fine))
    owners: dict[str, list[int]] = {name: [] for name in fine}
    faults = Faults("faults in data.superclasses")
    for position, members in enumerate(superclasses.values()):
        for member in dict.fromkeys(members):
            if member in owners:
                owners[member].append(position)
            else:
                faults.add(f"data.superclasses: {brief(member)} is no class")
    for name, found in owners.items():
        if len(found) != 1:
            number = f"{len(found)} superclasses" if found else "no superclass"
            faults.add(f"data.superclasses: {brief(name)} is in {number}")
    faults.check(f"The classes are: {', '.join(fine[:50])}{', …' if len(fine) > 50 else ''}.")
    return list(superclasses), torch.tensor([owners[name][0] for name in fine])
