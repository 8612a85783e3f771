"""Load a data set by name: its pixels, classes, superclasses, normalisation and held-out sample."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megu_cli.config import DataConfig
from megu_cli.data.builtin import resized
from megu_cli.data.decode import Preprocessing, Resizing
from megu_cli.data.images import Raw
from megu_cli.data.names import hashed
from megu_cli.data.own import Reserved, UserData
from megu_cli.data.splits import Dataset, Split
from megu_cli.errors import DataError, Faults, brief
from megu_cli.run.file_digests import FileDigestCache

# Of each class, images that are borrowed from the test split at least: the accuracy on fewer is hardly known.
_FEW = 50
# Nothing that the model says: size and normalisation are those of the data set.
_AS_IT_IS = Preprocessing()


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
    name, (mean, std) = settings.name, settings.source.normalisation
    if prepare.image_size is None:
        prepare = replace(prepare, image_size=settings.image_size)
    raw = _raw(settings, prepare.resizing, channels, order, reserved or Reserved(), file_digests or FileDigestCache())
    superclasses = raw.superclasses if settings.superclasses is None else settings.superclasses
    classes, concept_class = _coarse(raw.classes, superclasses)

    there = len(mean)
    wanted = channels or max(there, len(prepare.mean or ()))
    if there > wanted:
        raise DataError(
            f"the model takes {wanted}-channel images, {name} has {there}",
            "Choose another model.name; grey images can be repeated, colours cannot be dropped.",
        )
    if prepare.bgr:
        mean, std = mean[::-1], std[::-1]
    means, stds = _per_channel(prepare.mean or mean, wanted), _per_channel(prepare.std or std, wanted)

    splits = []
    for part in (raw.train, raw.test):
        digest = hashlib.sha256(repr((raw.classes, classes, superclasses, part.digest)).encode()).hexdigest()
        labels = concept_class[part.labels]
        splits.append(
            Split(part.images, labels, part.labels, part.names, means, stds, digest, part.subjects, prepare.bgr)
        )
    train, test = splits
    if settings.limit is not None and settings.limit < len(train):
        train = _limited(train, settings.limit)
    none = torch.empty(0, dtype=torch.int64)
    data = Dataset(
        name, classes, raw.classes, concept_class, train, train.view(none), test, none, raw.subjects, raw.test_made,
        settings.source.folder(settings), train.digest,
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
    module, _, function = settings.source.loader.partition(":")
    loader = getattr(importlib.import_module(f"megu_cli.data.{module}"), function)
    raw: Raw
    if settings.source.users:
        if resizing is None:
            raise DataError(f"data.name: {settings.name} needs data.image_size")
        raw = loader(UserData(settings, resizing, channels or 3, order, reserved, file_digests))
        return raw
    raw = loader(settings.root)
    return resized(raw, resizing) if resizing else raw


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


def _per_channel(given: Sequence[float] | None, channels: int) -> Tensor:
    """(C, 1, 1) of a mean or a standard deviation.

    Raises:
        DataError: It is given for another number of channels.
    """
    values = torch.tensor(given).view(-1, 1, 1)
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
