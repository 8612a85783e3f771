"""The forget request: which training images, classes and concepts are to be forgotten."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megu_cli.config import ForgetConfig
from megu_cli.data import Dataset
from megu_cli.data.names import alike, composed
from megu_cli.errors import DataError, Faults, brief
from megu_cli.execution.runtime import generator
from megu_cli.request.deletion_list import listed
from megu_cli.run.artifacts import digest

Kind = Literal["classes", "subclasses", "samples", "subjects", "random"]


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Request:
    """A forget request, resolved against a data set.

    Attributes:
        kind: Which of the requests it is; ``classes`` or ``subclasses``, too, where a list, people or a draw are all
            that there was of them.
        forget: (N_f,) int64, sorted positions of D_f in the training split. A requested image always belongs to it,
            also where it would have been held out for validation.
        retain: (N_r,) int64, positions of D_r without the validation sample.
        validation: (N_v,) int64, held-out positions of retained images. Images that are borrowed from the test split
            are in here or, where they are of a class or a subject to forget or copies of what is, nowhere.
        classes: Wholly forgotten classes of the model, sorted, those of earlier requests among them.
        concepts: Wholly forgotten concepts (finest classes), sorted, those of earlier requests among them.
        asked: Concepts that occur in D_f, sorted: the rows that the transition matrix needs.
        already: (N_a,) int64, positions forgotten by earlier requests: in neither D_f nor D_r nor the validation.
        copies: (N_c,) int64, positions with the same content as an image of the request: in D_f, or left in D_r.
        known: (N_k,) int64, borrowed positions that equal single images to forget, or show the same people: no images
            to tell by how sure the model is of what it has not seen.
        section: Which of the requests was asked.
        told: What the user should know of how lists and records were read, a line each.
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
    known: Tensor = field(default_factory=_none)
    section: Kind = "classes"
    told: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether images or people were asked for, not classes, whatever ``kind`` has become."""
        return self.section not in ("classes", "subclasses")

    def held_out(self, data: Dataset) -> Tensor:
        """Positions of held-out images that tell how sure the model is of what it has not seen."""
        positions = torch.where(data.validation)[0]
        return positions[~torch.isin(positions, self.known)]

    @property
    def digest(self) -> str:
        """Digest of what is forgotten and what is retained."""
        parts: list[Any] = [self.kind, self.forget.tolist(), len(self.retain), self.classes, self.concepts]
        # Keys of requests without these stay as they were.
        if len(self.already):
            parts.append(self.already.tolist())
        if len(self.known):
            parts.append({"known": self.known.tolist()})
        return digest(parts)


@dataclass(frozen=True)
class Earlier:
    """What earlier requests made the checkpoint forget.

    Attributes:
        positions: Of images in the training split.
        concepts: Those that are wholly forgotten.
        told: What the user should know of it, a line each.
    """

    positions: Tensor = field(default_factory=_none)
    concepts: Sequence[int] = ()
    told: tuple[str, ...] = ()

    def joined(self, other: Earlier) -> Earlier:
        """Both together."""
        positions = torch.cat([self.positions, other.positions]).unique()
        return Earlier(positions, sorted({*self.concepts, *other.concepts}), (*self.told, *other.told))


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
    missing: Literal["error", "ignore"] = "error",
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
        missing: ``ignore``: lines of a list that match nothing are skipped.

    Raises:
        DataError: A name, index or path is not in the data set, or the request is empty, or leaves nothing.
    """
    earlier = earlier or Earlier()
    forgotten: list[int] = []
    mask = torch.zeros(len(data.train), dtype=torch.bool)
    lent = torch.arange(len(data.train)) >= data.own
    same, lines = _none(), 0
    taken: list[str] = []
    if classes is not None:
        section: Kind = "classes"
        chosen = torch.tensor(class_positions(classes, data.classes, taken=taken), dtype=torch.int64)
        forgotten = torch.where(torch.isin(data.concept_class, chosen))[0].tolist()
        mask = torch.isin(data.train.labels, chosen)
    elif subclasses is not None:
        section = "subclasses"
        if data.concepts == data.classes:
            raise DataError(
                "forget.subclasses needs a coarse-labelled data set", "Set data.superclasses, or use cifar20."
            )
        forgotten = class_positions(subclasses, data.concepts, taken=taken)
        mask = torch.isin(data.train.concepts, torch.tensor(forgotten, dtype=torch.int64))
    elif samples is not None or subjects is not None:
        if samples is not None:
            section = "samples"
            found = listed(samples, data, "forget.samples", missing)
            mask[found.positions], lines = True, found.lines
        else:
            section = "subjects"
            mask = torch.isin(_whose(data), torch.tensor(_known(subjects or [], data), dtype=torch.int64))
        contents = data.train.images.contents()
        same = torch.where(torch.isin(contents, contents[mask & ~lent]) & ~mask)[0]
        mask[same] = copies
        same = same[same < data.own]
    else:
        section = "random"
        # Drawn among the images that `megu train` trains on: forgetting one that was held out means nothing.
        free = ~data.validation
        free[earlier.positions] = False
        trained = torch.where(free)[0]
        number = count if count is not None else round((fraction or 0) * len(trained))
        if number > len(trained):
            raise DataError(f"forget.random asks for {number} of {len(trained)} images")
        order = torch.randperm(len(trained), generator=generator(seed, "forget", "random"))
        mask[trained[order[:number]]] = True
    told = [*(f"forget.{section}: {line}" for line in taken), *earlier.told]
    if lines:
        told.insert(0, f"forget.samples: {len(found.positions):,} of {lines:,} lines matched, "
                       f"{int((mask & ~lent).sum()):,} images with copies")  # fmt: skip
    before = torch.zeros_like(mask)
    before[earlier.positions] = True
    borrowed = lent & (mask | before)
    mask &= ~lent
    # A list may hold all that there was of a concept: a model that never saw it does not know it.
    trained_on = data.train.concepts[~mask & ~before & ~data.validation]
    emptied = {*data.train.concepts[(mask | before) & ~lent].tolist()} - {*trained_on.unique().tolist()}
    forgotten = sorted({*forgotten, *emptied, *earlier.concepts})
    # What is borrowed was never trained on: of what is forgotten it is no part, nor of what is kept.
    nowhere = borrowed | torch.isin(data.train.concepts, torch.tensor(forgotten, dtype=torch.int64))
    if not mask.any():
        raise DataError(f"the forget set is empty: forget.{section} matches no training image")
    if not (mask & ~before).any():
        raise DataError(f"forget.{section} names nothing that forget.already does not name")
    before &= ~mask & ~lent
    gone = torch.ones(len(data.classes), dtype=torch.bool)
    kept = torch.ones(len(data.concepts), dtype=torch.bool)
    kept[torch.tensor(forgotten, dtype=torch.int64)] = False
    gone[data.concept_class[kept]] = False
    if int((~gone).sum()) < 2:
        raise DataError(
            f"forget.{section} leaves {int((~gone).sum())} of {len(data.classes)} classes",
            "At least two must remain for a classifier to be one.",
        )
    retain = torch.where(~mask & ~before & ~data.validation)[0]
    if not len(retain):
        raise DataError(f"forget.{section} leaves no training image")
    kind = section
    if section != "subclasses" and gone[data.train.labels[mask]].all():
        kind = "classes"
    elif not kept[data.train.concepts[mask]].any():
        kind = "subclasses"
    return Request(
        kind=kind,
        forget=torch.where(mask)[0],
        retain=retain,
        validation=torch.where(~mask & ~before & ~nowhere & data.validation)[0],
        classes=torch.where(gone)[0].tolist(),
        concepts=forgotten,
        asked=data.train.concepts[mask].unique().tolist(),
        already=torch.where(before)[0],
        copies=same,
        known=torch.where(borrowed)[0] if section in ("samples", "subjects") else _none(),
        section=section,
        told=tuple(told),
    )


def asked(settings: ForgetConfig) -> dict[str, Any]:
    """The arguments of `resolve` that the config's section gives."""
    share = settings.random
    return {
        "classes": settings.classes,
        "subclasses": settings.subclasses,
        "samples": settings.samples,
        "subjects": settings.subjects,
        "fraction": share.fraction if share else None,
        "count": share.count if share else None,
        "copies": settings.duplicates == "include",
    }


def notes(data: Dataset, request: Request, duplicates: str) -> list[str]:
    """What the user should know of a request, a line each."""
    lines = list(request.told)
    whole = [data.concepts[c] for c in request.asked if c in request.concepts]
    if whole and request.single:
        named = ", ".join(whole[:5]) + (f" and {len(whole) - 5} more" if len(whole) > 5 else "")
        like = f"; the request is as forget.{request.kind} would be" if request.kind != request.section else ""
        lines.append(f"all training images of {named} are among these: a retrained model would not know them{like}")
    if len(request.copies):
        named = ", ".join(data.train.names[i] for i in request.copies[:5].tolist())
        more = f" and {len(request.copies) - 5} more" if len(request.copies) > 5 else ""
        one = len(request.copies) == 1
        what = f"{'is' if one else 'are'} forgotten with them"
        if duplicates != "include":
            what = f"{'STAYS' if one else 'STAY'} (forget.duplicates: warn)"
        lines.append(
            f"{len(request.copies)} {'copy' if one else 'copies'} of the images to forget {what}: {named}{more}"
        )
    if request.section == "subjects" and data.test.subjects is not None:
        people = _whose(data)[request.forget].unique()
        unseen = int(torch.isin(data.test.subjects, people).sum())
        if unseen:
            lines.append(f"{unseen} test images are of the same subjects: they count as unseen, and stay in the test")
    if len(request.already):
        lines.append(f"{len(request.already)} training images were forgotten before and are left alone")
    return lines


def class_positions(
    names: Sequence[str | int], known: Sequence[str], key: str = "forget", taken: list[str] | None = None
) -> list[int]:
    """Sorted positions of classes given by name (first) or by index.

    Accents may be written either way. Where only case or spaces differ from one class, that class is meant.

    Args:
        names: Names or indices.
        known: Names of all classes.
        key: Of the config, for the error.
        taken: Gets a line for each name that is taken for one that is written in another way.

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
            same = [i for i, other in enumerate(known) if alike(other) == alike(str(name))]
            if len(same) == 1:
                place = same[0]
                if taken is not None:
                    taken.append(f"{brief(name)} is taken for the class {brief(known[place])}")
        if place is None:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise DataError(
                f"{key}: there is no class {brief(name)}" + (f"; did you mean {near[0]!r}?" if near else ""),
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
            faults.add(
                f"forget.subjects: there is no {brief(given)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    faults.check()
    return [position[str(given)] for given in ids]
