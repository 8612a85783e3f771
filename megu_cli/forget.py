"""The forget request: which training images, classes and concepts are to be forgotten."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megu_cli.artifacts import digest
from megu_cli.data import Dataset
from megu_cli.data.names import composed
from megu_cli.data.paths import relative
from megu_cli.errors import DataError, Faults
from megu_cli.runtime import generator

Kind = Literal["classes", "subclasses", "samples", "subjects", "random"]


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Request:
    """A forget request, resolved against a data set.

    Attributes:
        kind: Which of the requests it is.
        forget: (N_f,) int64, sorted positions of D_f in the training split. A requested image always belongs to it,
            also where it would have been held out for validation.
        retain: (N_r,) int64, positions of D_r without the validation sample.
        validation: (N_v,) int64, held-out positions of retained images.
        classes: Wholly forgotten classes of the model, sorted, those of earlier requests among them.
        concepts: Wholly forgotten concepts (finest classes), sorted, those of earlier requests among them.
        asked: Concepts that occur in D_f, sorted: the rows that the transition matrix needs.
        already: (N_a,) int64, positions forgotten by earlier requests: in neither D_f nor D_r nor the validation.
        copies: (N_c,) int64, positions with the same content as an image of the request: in D_f, or left in D_r.
    """

    kind: Kind
    forget: Tensor
    retain: Tensor
    validation: Tensor
    classes: list[int]
    concepts: list[int]
    asked: list[int]
    already: Tensor = field(default_factory=_none)
    copies: Tensor = field(default_factory=_none)

    @property
    def digest(self) -> str:
        """Digest of what is forgotten and what is retained."""
        parts: list[Any] = [self.kind, self.forget.tolist(), len(self.retain), self.classes, self.concepts]
        if len(self.already):
            parts.append(self.already.tolist())
        return digest(parts)


@dataclass(frozen=True)
class Earlier:
    """What earlier requests made the checkpoint forget: positions in the training split, and whole concepts."""

    positions: Tensor = field(default_factory=_none)
    concepts: Sequence[int] = ()

    @classmethod
    def of(cls, data: Dataset, concepts: Sequence[str], contents: Sequence[int]) -> Earlier:
        """From the record of a run. Images that are no longer in the data need no mention.

        Raises:
            DataError: A concept is not in the data.
        """
        gone = _classes(concepts, data.concepts, "forget.already")
        mask = torch.isin(data.train.concepts, torch.tensor(gone, dtype=torch.int64))
        if contents:
            mask |= torch.isin(data.train.images.contents(), torch.tensor(contents, dtype=torch.int64))
        return cls(torch.where(mask)[0], gone)

    @classmethod
    def listed(cls, data: Dataset, path: Path) -> Earlier:
        """From a deletion list. Images that are no longer in the data need no mention.

        Raises:
            DataError: The list cannot be read.
        """
        return cls(torch.tensor(_listed(path, data, "forget.already", gone=True), dtype=torch.int64))

    def joined(self, other: Earlier) -> Earlier:
        """Both together."""
        positions = torch.cat([self.positions, other.positions]).unique()
        return Earlier(positions, sorted({*self.concepts, *other.concepts}))


def resolve(
    data: Dataset,
    *,
    classes: Sequence[str | int] | None = None,
    subclasses: Sequence[str] | None = None,
    samples: Path | None = None,
    subjects: Sequence[str | int] | None = None,
    fraction: float | None = None,
    count: int | None = None,
    copies: bool = True,
    earlier: Earlier | None = None,
    seed: int = 0,
) -> Request:
    """Resolve a forget request; exactly one kind is given.

    Args:
        data: The data set.
        classes: Names, or indices, of classes.
        subclasses: Names of concepts.
        samples: A deletion list.
        subjects: Ids whose images are all to be forgotten.
        fraction: Share of the training images.
        count: Number of training images.
        copies: Images with the same content as a listed or a subject's one are forgotten with it.
        earlier: What was forgotten before.
        seed: Of the random request.

    Raises:
        DataError: A name, index or path is not in the data set, or the request is empty, or leaves nothing.
    """
    earlier = earlier or Earlier()
    forgotten: list[int] = []
    mask = torch.zeros(len(data.train), dtype=torch.bool)
    same = _none()
    if classes is not None:
        kind: Kind = "classes"
        chosen = torch.tensor(_classes(classes, data.classes), dtype=torch.int64)
        forgotten = torch.where(torch.isin(data.concept_class, chosen))[0].tolist()
        mask = torch.isin(data.train.labels, chosen)
    elif subclasses is not None:
        kind = "subclasses"
        if data.concepts == data.classes:
            raise DataError(
                "forget.subclasses needs a coarse-labelled data set", "Set data.superclasses, or use cifar20."
            )
        forgotten = _classes(subclasses, data.concepts)
        mask = torch.isin(data.train.concepts, torch.tensor(forgotten, dtype=torch.int64))
    elif samples is not None or subjects is not None:
        if samples is not None:
            kind = "samples"
            mask[_listed(samples, data, "forget.samples")] = True
        else:
            kind = "subjects"
            mask = torch.isin(_whose(data), torch.tensor(_known(subjects or [], data), dtype=torch.int64))
        contents = data.train.images.contents()
        same = torch.where(torch.isin(contents, contents[mask]) & ~mask)[0]
        mask[same] = copies
    else:
        kind = "random"
        # Drawn among the images that `megu train` trains on: forgetting one that was held out means nothing.
        free = ~data.validation
        free[earlier.positions] = False
        trained = torch.where(free)[0]
        number = count if count is not None else round((fraction or 0) * len(trained))
        if number > len(trained):
            raise DataError(f"forget.random asks for {number} of {len(trained)} images")
        order = torch.randperm(len(trained), generator=generator(seed, "forget", "random"))
        mask[trained[order[:number]]] = True
    if not mask.any():
        raise DataError(f"the forget set is empty: forget.{kind} matches no training image")
    before = torch.zeros_like(mask)
    before[earlier.positions] = True
    if not (mask & ~before).any():
        raise DataError(f"forget.{kind} names nothing that forget.already does not name")
    before &= ~mask
    forgotten = sorted({*forgotten, *earlier.concepts})
    gone = torch.ones(len(data.classes), dtype=torch.bool)
    kept = torch.ones(len(data.concepts), dtype=torch.bool)
    kept[torch.tensor(forgotten, dtype=torch.int64)] = False
    gone[data.concept_class[kept]] = False
    if int((~gone).sum()) < 2:
        raise DataError(
            f"forget.{kind} leaves {int((~gone).sum())} of {len(data.classes)} classes",
            "At least two must remain for a classifier to be one.",
        )
    return Request(
        kind=kind,
        forget=torch.where(mask)[0],
        retain=torch.where(~mask & ~before & ~data.validation)[0],
        validation=torch.where(~mask & ~before & data.validation)[0],
        classes=torch.where(gone)[0].tolist(),
        concepts=forgotten,
        asked=data.train.concepts[mask].unique().tolist(),
        already=torch.where(before)[0],
        copies=same,
    )


def record(data: Dataset, request: Request) -> dict[str, list[str]]:
    """What has been forgotten now and before, for a later request to read: nothing of it names an image.

    Images are given by the start of their content's sha256, so that the record holds when files are renamed, and tells
    nothing to who does not have the image.
    """
    both = torch.cat([request.forget, request.already])
    single = both[~torch.isin(data.train.concepts[both], torch.tensor(request.concepts, dtype=torch.int64))]
    # Hashing all pixels of a data set in memory is only worth it where single images were forgotten.
    contents = data.train.images.contents()[single].unique().tolist() if len(single) else []
    return {
        "concepts": [data.concepts[c] for c in request.concepts],
        "images": [f"{content & (2**64 - 1):016x}" for content in contents],
    }


def recorded(content: Any, where: str) -> tuple[list[str], list[int]]:
    """Concepts and contents of images in a `record`.

    Raises:
        DataError: It is none.
    """
    try:
        unsigned = [int(image, 16) for image in content["images"]]
        return [str(name) for name in content["concepts"]], [n - (n >> 63 << 64) for n in unsigned]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"forget.already: {where} does not say what was forgotten there") from None


def notes(data: Dataset, request: Request, duplicates: str) -> list[str]:
    """What the user should know of a request, a line each."""
    lines = []
    if len(request.copies):
        named = ", ".join(data.train.names[i] for i in request.copies[:5].tolist())
        more = f" and {len(request.copies) - 5} more" if len(request.copies) > 5 else ""
        what = "are forgotten with them" if duplicates == "include" else "STAY (forget.duplicates: warn)"
        lines.append(f"{len(request.copies)} copies of the images to forget {what}: {named}{more}")
    if request.kind == "subjects" and data.test.subjects is not None:
        people = _whose(data)[request.forget].unique()
        unseen = int(torch.isin(data.test.subjects, people).sum())
        if unseen:
            lines.append(f"{unseen} test images are of the same subjects: they count as unseen, and stay in the test")
    if len(request.already):
        lines.append(f"{len(request.already)} training images were forgotten before and are left alone")
    return lines


def _classes(names: Sequence[str | int], known: Sequence[str], key: str = "forget") -> list[int]:
    """Sorted positions of classes given by name (first) or by index; accents may be written either way.

    Raises:
        DataError: There is no such class.
    """
    position = {name: i for i, name in enumerate(known)}
    found = set()
    for name in names:
        place = position.get(str(name))
        if place is None and isinstance(name, int) and 0 <= name < len(known):
            place = name
        if place is None:
            forms = {composed(other): i for i, other in enumerate(known)}
            place = forms.get(composed(str(name)))
        if place is None:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise DataError(
                f"{key}: there is no class {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                f"The classes are: {', '.join(known[:50])}{', …' if len(known) > 50 else ''}.",
            )
        found.add(place)
    return sorted(found)


def _whose(data: Dataset) -> Tensor:
    """(N,) subjects of the training images.

    Raises:
        DataError: They are not known.
    """
    if data.train.subjects is None:
        raise DataError(
            "forget.subjects needs data that say whose images they are",
            "Use a manifest with a column subject (data.name: manifest), or list the images with forget.samples.",
        )
    return data.train.subjects


def _known(ids: Sequence[str | int], data: Dataset) -> list[int]:
    """Positions of subjects.

    Raises:
        DataError: Ids are in no line of the data; the first five are named.
    """
    position = {name: i for i, name in enumerate(data.subjects)}
    faults = Faults("subjects are unknown")
    for given in ids:
        if str(given) not in position:
            near = difflib.get_close_matches(str(given), data.subjects, n=1)
            faults.add(f"forget.subjects: there is no {given!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    faults.check()
    return [position[str(given)] for given in ids]


def paths_in(path: Path) -> list[str]:
    """Relative paths that a deletion list names, in any of the ways that the names of images are looked up.

    Raises:
        DataError: It cannot be read.
    """
    return [_tidy(cell) for _, cell in _cells(path, "forget.samples")]


def _cells(path: Path, key: str) -> list[tuple[int, str]]:
    """Line and first column of each line of a CSV; empty ones and a header do not count."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            cells = [(reader.line_num, row[0].strip()) for row in reader if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{key}: {path} cannot be read: {error}") from None
    return cells[1:] if cells and cells[0][1].lower() in ("index", "path", "sample", "file", "name") else cells


def _tidy(cell: str) -> str:
    try:
        return relative(cell)
    except DataError:
        return cell  # it names no image, which is said where it is looked up


def _listed(path: Path, data: Dataset, key: str, gone: bool = False) -> list[int]:
    """Positions listed in a CSV: the first column of each line, an index or a relative path.

    Args:
        path: The CSV; a header is allowed.
        data: The data set.
        key: Named in errors.
        gone: Images may have left the data since.

    Raises:
        DataError: The file is missing, or lines are out of range, unknown or there twice; up to five are named.
    """
    names = data.train.names
    # The few that are listed are looked for among all: a table of all names would take the memory of the data set.
    wanted: dict[str, list[tuple[int, str]]] = {}
    seen: dict[int, int] = {}
    faults = Faults(f"lines of {path} are at fault")

    def take(line: int, cell: str, position: int) -> None:
        if position in seen:
            faults.add(f"{key}: line {line}: {cell} stands in line {seen[position]} already")
        else:
            seen[position] = line

    for line, cell in _cells(path, key):
        if not cell.lstrip("-").isdigit():
            wanted.setdefault(_tidy(cell), []).append((line, cell))
        elif 0 <= int(cell) < len(names):
            take(line, cell, int(cell))
        else:
            faults.add(f"{key}: line {line}: {cell} is no index below {len(names)}")

    def search(form: Any) -> None:
        for position, name in enumerate(names):
            for known in dict.fromkeys((form(name), form(name.removeprefix("train/")))):
                for line, cell in wanted.pop(known, []):
                    take(line, cell, position)

    if wanted:
        search(str)
    if any(not name.isascii() for name in wanted):
        wanted = {composed(name): cells for name, cells in wanted.items()}
        search(composed)
    if wanted and not gone:
        unseen = _among(wanted, data.test.names)
        for name, cells in wanted.items():
            for line, cell in cells:
                why = "is a test image: nothing was trained on it" if name in unseen else "is no image of the data"
                faults.add(f"{key}: line {line}: {cell} {why}")
    faults.check()
    return sorted(seen)


def _among(wanted: Iterable[str], names: Sequence[str]) -> set[str]:
    keys = set(wanted)
    return {key for name in names for key in (name, name.removeprefix("test/")) if key in keys}
