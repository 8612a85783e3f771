"""The user's own data sets: images in folders, or named in a table."""

from __future__ import annotations

import csv
import hashlib
import io
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megu_cli.config import DataConfig
from megu_cli.data.decode import Decode, Resizing, inspect
from megu_cli.data.images import EncodedImages, Files, Part, Raw, Source
from megu_cli.data.names import Names, alike, composed, hashed
from megu_cli.data.paths import Root, relative
from megu_cli.errors import DataError, Faults, brief
from megu_cli.run import reading
from megu_cli.run.file_digests import FileDigestCache

_Array = np.ndarray[Any, Any]
_TEST = ("test", "val")


@dataclass(frozen=True)
class Reserved:
    """What never goes into a test split that is made here, because a request names it.

    Attributes:
        names: Relative paths.
        subjects: Ids.
        contents: As `Images.contents` gives them.
    """

    names: frozenset[str] = frozenset()
    subjects: frozenset[str] = frozenset()
    contents: frozenset[int] = frozenset()


@dataclass(frozen=True)
class UserData:
    """The user's own data set, and how it is read.

    Attributes:
        settings: The section ``data`` of the config.
        resizing: The size of the images, and how they are brought to it.
        channels: 1 for grey, 3 for RGB.
        classes: The classes in the order of the model's outputs, also those without images; ``None``: sorted.
        reserved: Images that stay out of a test split made here.
        file_digests: Remembers digests of files.
    """

    settings: DataConfig
    resizing: Resizing
    channels: int = 3
    classes: Sequence[str] | None = None
    reserved: Reserved = field(default_factory=Reserved)
    file_digests: FileDigestCache = field(default_factory=FileDigestCache)


@dataclass(frozen=True)
class Listing:
    """Images by name: (N,) labels, (N,) whether each is a test image, (N,) whose it is (-1: nobody's) and the ids."""

    names: Names
    labels: _Array
    test: _Array | None
    subjects: _Array | None = None
    people: Sequence[str] = ()


def imagefolder(user: UserData) -> Raw:
    """``root/train/CLASS/*`` with ``root/test/CLASS/*`` (or ``val``), or ``root/CLASS/*`` alone.

    Raises:
        DataError: The folders are not laid out so, a class has no images, or files are at fault.
    """
    if user.settings.root is None:
        raise DataError("data.name: imagefolder needs data.root")
    root = Root(user.settings.root, user.settings.follow_links)
    there = root.folders()
    splits = [""]
    if "train" in there and root.folders("train"):
        other = next((name for name in _TEST if name in there), None)
        if other is None:
            raise DataError(
                f"{root.path} has train/ but no test/",
                "Add test/CLASS/ folders; or set data.root to train/ itself, and a test split is made from it.",
            )
        splits = ["train", other]
    found = {split: root.folders(split) for split in splits}
    labels = dict.fromkeys(name for names in found.values() for name in names)
    if not labels:
        raise DataError(f"{root.path} holds no folders of classes", "An imagefolder has CLASS/ or train/CLASS/ in it.")
    classes, position = ordered(labels, user.classes)
    test_only = sorted(set(found[splits[-1]]) - set(found[splits[0]]))
    if test_only and user.classes is None:
        raise DataError(f"{root.path}/{splits[-1]}: classes without training images: {', '.join(test_only[:5])}")

    counts = array("q")
    owner = array("q")
    side = array("b")
    faults = Faults("folders hold no images")

    def walk() -> Iterator[str]:
        for split in splits:
            for label in found[split]:
                folder = f"{split}/{label}" if split else label
                number = 0
                for number, name in enumerate(root.images(folder), 1):  # noqa: B007 - the last one counts them
                    yield name
                counts.append(number)
                owner.append(position[label])
                side.append(split == splits[-1])
                if not number and user.classes is None and split == splits[0]:
                    faults.add(f"{root.path}/{folder} holds no images")

    names = Names.of(walk())
    faults.check("Remove the folder; or, if the model has an output for the class, list all of them in model.classes.")
    repeat = np.array(counts)
    test = np.repeat(np.array(side, dtype=bool), repeat) if len(splits) == 2 else None
    return _files(root, classes, Listing(names, np.repeat(np.array(owner), repeat), test), user)


def manifest(user: UserData) -> Raw:
    """Images named in a CSV with the columns ``path, label`` and, where wanted, ``split`` and ``subject``.

    Raises:
        DataError: The file cannot be read or lines of it are at fault (the first five are named), or files are.
    """
    if user.settings.manifest is None:
        raise DataError("data.name: manifest needs data.manifest")
    file = user.settings.manifest
    root = Root(user.settings.root or file.parent, user.settings.follow_links)
    faults = Faults(f"lines of {file} are at fault")
    labels: dict[str, int] = {}
    people: dict[str, int] = {}
    label, subject, test = array("q"), array("q"), array("b")
    lines = array("q")
    columns: dict[str, int] = {}

    def walk() -> Iterator[str]:
        for line, row in _rows(file):
            if not columns:
                columns.update(_columns(file, row))
                continue
            try:
                name = relative(_cell(row, columns["path"]))
                given = _cell(row, columns["label"])
                side = _side(_cell(row, columns["split"])) if "split" in columns else False
                if not given:
                    raise DataError(f"{name} has no label")
                if fault := root.outside(name):
                    raise DataError(fault)
            except DataError as error:
                faults.add(f"line {line}: {error.message}")
                continue
            lines.append(line)
            label.append(labels.setdefault(given, len(labels)))
            test.append(side)
            person = _cell(row, columns["subject"]) if "subject" in columns else ""
            subject.append(people.setdefault(person, len(people)) if person else -1)
            yield name

    names = Names.of(walk())
    _repeated(names, lines, faults)
    faults.check("Paths are relative to data.root (without it, to the manifest's folder) and may not lead out of it.")
    if not len(names):
        raise DataError(f"{file} names no images", "It has a header path,label[,split][,subject] and a line an image.")
    classes, position = ordered(labels, user.classes, numeric=True)
    to = np.array([position[name] for name in labels], dtype=np.int64)
    listing = Listing(
        names,
        to[np.array(label)],
        np.array(test, dtype=bool) if "split" in columns else None,
        np.array(subject) if people else None,
        list(people),
    )
    return _files(root, classes, listing, user)


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with reading.opened(file) as stream:
            reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            for row in reader:
                if any(map(str.strip, row)):
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _columns(file: Path, header: Sequence[str]) -> dict[str, int]:
    columns = {name.strip().lower(): i for i, name in reversed(list(enumerate(header)))}
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise DataError(
            f"{file} has no column {' and no column '.join(missing)} (its header: {', '.join(header)})",
            "The first line names the columns: path,label and, if you like, split and subject.",
        )
    return columns


def _cell(row: Sequence[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def _side(split: str) -> bool:
    if split.lower() not in ("train", "test"):
        raise DataError(f"split is {brief(split)}, neither train nor test")
    return split.lower() == "test"


def _repeated(names: Names, lines: Sequence[int], faults: Faults) -> None:
    """Note names that are there twice; told by hash, since a set of a million names takes much memory."""
    marks = hashed(names, "repeated")
    order = np.argsort(marks, kind="stable")
    for place in np.flatnonzero(marks[order][1:] == marks[order][:-1]):
        first, second = int(order[place]), int(order[place + 1])
        faults.add(f"line {lines[second]}: {names[second]} stands in line {lines[first]} already")


def ordered(
    found: Iterable[str], given: Sequence[str] | None, numeric: bool = False
) -> tuple[list[str], dict[str, int]]:
    """The classes in the order of the model's outputs, and the position of each label that was found.

    Args:
        found: The labels of the data.
        given: The classes in order; ``None``: sorted by name, as torchvision does.
        numeric: Sort by value where all labels are numbers.

    Raises:
        DataError: Labels look the same, or are not among the classes that were given.
    """
    labels = list(found)
    if given is None:
        faults = Faults("labels look like others")
        seen: dict[str, str] = {}
        for label in labels:
            other = seen.setdefault(alike(label), label)
            if other != label:
                faults.add(f"the labels {brief(other)} and {brief(label)} differ in case, spaces or Unicode form only")
        faults.check("Write them alike; or, if they are two classes, list all of them in model.classes.")
        numbers = numeric and all(label.isdecimal() for label in labels)
        classes = sorted(labels, key=int) if numbers else sorted(labels)
        return classes, {name: i for i, name in enumerate(classes)}
    classes = list(given)
    position = {name: i for i, name in enumerate(classes)}
    if len(position) < len(classes):
        twice = next(name for i, name in enumerate(classes) if position[name] != i)
        raise DataError(f"model.classes names {brief(twice)} twice")
    by_form = {composed(name): i for name, i in position.items()}
    faults = Faults("labels are not among model.classes")
    for label in labels:
        place = position.get(label, by_form.get(composed(label)))
        if place is None:
            faults.add(f"the label {brief(label)} is not among model.classes")
        else:
            position[label] = place
    faults.check()
    return classes, position


def _files(root: Root, classes: list[str], listing: Listing, user: UserData) -> Raw:
    """Both splits of images that lie in files."""
    digests = user.file_digests.digests((f"{root.path}/{name}" for name in listing.names), inspect)
    return assembled(root.path, classes, listing, digests, Files(root.path, listing.names), user)


def assembled(where: str, classes: list[str], listing: Listing, digests: _Array, source: Source, user: UserData) -> Raw:
    """Both splits, made here where there are none.

    Args:
        where: Named in errors.
        classes: In the order of the model's outputs.
        listing: Names, labels, splits and subjects.
        digests: (N, 32) sha256 of the images' bytes.
        source: Of the bytes.
        user: The data set that is read.

    Raises:
        DataError: A split has no images.
    """
    contents = np.ascontiguousarray(digests[:, :8]).view(">i8")[:, 0].astype(np.int64)
    test = made_split(listing, contents, user) if listing.test is None else listing.test
    parts = []
    for kind, mask in (("training", ~test), ("test", test)):
        if not mask.any():
            raise DataError(f"{where} leaves no {kind} images", "Check the split, or data.test_fraction.")
        index = np.flatnonzero(mask)
        names, labels = listing.names.at(index), listing.labels[index]
        whose = None if listing.subjects is None else listing.subjects[index]
        total = hashlib.sha256(f"{user.resizing.key} {list(listing.people)}".encode())
        total.update(hashlib.sha256(names.text).digest())
        for block in (names.ends, labels, digests[index], labels if whose is None else whose):
            total.update(hashlib.sha256(block.tobytes()).digest())
        images = EncodedImages(
            source.at(index),
            Decode(user.resizing, user.channels),
            torch.from_numpy(contents[index]),
            user.settings.workers,
            keep=len(index) * user.channels * user.resizing.size**2 <= user.settings.memory_limit * 2**30,
        )
        subjects = None if whose is None else torch.from_numpy(whose)
        parts.append(Part(images, torch.from_numpy(labels), names, total.hexdigest(), subjects))
    return Raw(classes, parts[0], parts[1], listing.people, listing.test is None)


def made_split(listing: Listing, contents: _Array, user: UserData) -> _Array:
    """(N,) which images are test images: by hash of whose they are, else of their name.

    One person is never on both sides, and what a request names is always on the side of training.
    """
    reserved, subjects = user.reserved, listing.subjects
    test = hashed(listing.names, "test") < user.settings.test_fraction
    named = np.fromiter((name in reserved.names for name in listing.names), dtype=bool)
    if reserved.contents:
        named |= np.isin(contents, np.fromiter(reserved.contents, dtype=np.int64))
    if subjects is not None:
        drawn = hashed(listing.people, "test") < user.settings.test_fraction
        kept = np.array([person in reserved.subjects for person in listing.people])
        whose = subjects >= 0
        kept[subjects[named & whose]] = True
        test[whose] = (drawn & ~kept)[subjects[whose]]
    result: _Array = test & ~named
    return result
