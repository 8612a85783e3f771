"""The forget request: which training images, classes and concepts are to be forgotten."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megu_cli.artifacts import digest
from megu_cli.data import Dataset
from megu_cli.errors import DataError
from megu_cli.runtime import generator

Kind = Literal["classes", "subclasses", "samples", "random"]


@dataclass(frozen=True)
class Request:
    """A forget request, resolved against a data set.

    Attributes:
        kind: Which of the four requests it is.
        forget: (N_f,) int64, sorted positions of D_f in the training split. A requested image always belongs to it,
            also where it would have been held out for validation.
        retain: (N_r,) int64, positions of D_r without the validation sample.
        validation: (N_v,) int64, held-out positions of retained images.
        classes: Wholly forgotten classes of the model, sorted.
        concepts: Wholly forgotten concepts (finest classes), sorted.
        asked: Concepts that occur in D_f, sorted: the rows that the transition matrix needs.
    """

    kind: Kind
    forget: Tensor
    retain: Tensor
    validation: Tensor
    classes: list[int]
    concepts: list[int]
    asked: list[int]

    @property
    def digest(self) -> str:
        """Digest of what is forgotten and what is retained."""
        return digest([self.kind, self.forget.tolist(), len(self.retain), self.classes, self.concepts])


def resolve(
    data: Dataset,
    *,
    classes: Sequence[str | int] | None = None,
    subclasses: Sequence[str] | None = None,
    samples: Path | None = None,
    fraction: float | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Request:
    """Resolve a forget request; exactly one kind is given.

    Raises:
        DataError: A name, index or path is not in the data set, or the request is empty, or leaves nothing.
    """
    forgotten: list[int] = []
    if classes is not None:
        kind: Kind = "classes"
        chosen = sorted({_class(name, data.classes) for name in classes})
        forgotten = [i for i, c in enumerate(data.concept_class.tolist()) if c in chosen]
        mask = torch.isin(data.train.labels, torch.tensor(chosen, dtype=torch.int64))
    elif subclasses is not None:
        kind = "subclasses"
        if data.concepts == data.classes:
            raise DataError(
                "forget.subclasses needs a coarse-labelled data set", "Set data.superclasses, or use cifar20."
            )
        forgotten = sorted({_class(name, data.concepts) for name in subclasses})
        mask = torch.isin(data.train.concepts, torch.tensor(forgotten, dtype=torch.int64))
    elif samples is not None:
        kind = "samples"
        mask = torch.zeros(len(data.train), dtype=torch.bool)
        mask[_listed(samples, data.train.names)] = True
    else:
        kind = "random"
        # Drawn among the images that `megu train` trains on: forgetting one that was held out means nothing.
        trained = torch.where(~data.validation)[0]
        number = count if count is not None else round((fraction or 0) * len(trained))
        if number > len(trained):
            raise DataError(f"forget.random asks for {number} of {len(trained)} images")
        order = torch.randperm(len(trained), generator=generator(seed, "forget", "random"))
        mask = torch.zeros(len(data.train), dtype=torch.bool)
        mask[trained[order[:number]]] = True
    if not mask.any():
        raise DataError(f"the forget set is empty: forget.{kind} matches no training image")
    gone = {
        int(c)
        for c in data.concept_class.tolist()
        if all(i in forgotten for i, owner in enumerate(data.concept_class.tolist()) if owner == c)
    }
    if len(data.classes) - len(gone) < 2:
        raise DataError(
            f"forget.{kind} leaves {len(data.classes) - len(gone)} of {len(data.classes)} classes",
            "At least two must remain for a classifier to be one.",
        )
    return Request(
        kind=kind,
        forget=torch.where(mask)[0],
        retain=torch.where(~mask & ~data.validation)[0],
        validation=torch.where(~mask & data.validation)[0],
        classes=sorted(gone),
        concepts=forgotten,
        asked=sorted(set(data.train.concepts[mask].tolist())),
    )


def _class(name: str | int, known: list[str]) -> int:
    """Position of a class given by name (first) or by index."""
    if str(name) in known:
        return known.index(str(name))
    if isinstance(name, int) and 0 <= name < len(known):
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    raise DataError(
        f"forget: there is no class {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        f"The classes are: {', '.join(known[:50])}{', …' if len(known) > 50 else ''}.",
    )


def _listed(path: Path, names: Sequence[str]) -> list[int]:
    """Positions listed in a CSV: the first column of each line, an index or a relative path; a header is allowed.

    Raises:
        DataError: The file is missing, or lines are out of range, unknown or there twice; up to five are named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            cells = [(n, row[0].strip()) for n, row in enumerate(csv.reader(stream), 1) if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"forget.samples: {path} cannot be read: {error}") from None
    if cells and cells[0][1].lower() in ("index", "path", "sample", "file", "name"):
        cells = cells[1:]
    position = {name: i for i, name in enumerate(names)}
    position |= {name.removeprefix("train/"): i for i, name in enumerate(names)}
    seen: dict[int, int] = {}
    faults = []
    for line, cell in cells:
        found = position.get(cell)
        if cell.lstrip("-").isdigit():
            found = int(cell) if 0 <= int(cell) < len(names) else None
        if found is None:
            faults.append(f"line {line}: {cell} is no index below {len(names)} and no image of the training data")
        elif found in seen:
            faults.append(f"line {line}: {cell} stands in line {seen[found]} already")
        else:
            seen[found] = line
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"forget.samples: {path} has {len(faults)} faulty line(s)\n{shown}{more}")
    return sorted(seen)
