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
        retain: (N_r,) int64, positions of D_r in the training split, without the held-out images.
        validation: (N_v,) int64, positions of retained images in the held-out split: none of a class or a subject to
            forget, and no copy of an image to forget.
        classes: Wholly forgotten classes of the model, sorted, those of earlier requests among them.
        concepts: Wholly forgotten concepts (finest classes), sorted, those of earlier requests among them.
        asked: Concepts that occur in D_f, sorted: the rows that the transition matrix needs.
        already: (N_a,) int64, positions forgotten by earlier requests: in neither D_f nor D_r nor the validation.
        copies: (N_c,) int64, positions with the same content as an image of the request: in D_f, or left in D_r.
        known: (N_k,) int64, positions in the held-out split of images from the test split that equal single images to
            forget, or show the same people: they do not show how sure the model is of unseen images.
        train_images: Number of training images.
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
    train_images: int = 0
    section: Kind = "classes"
    told: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether images or people were asked for, not classes, whatever ``kind`` has become."""
        return self.section not in ("classes", "subclasses")

    def held_out(self, data: Dataset) -> Tensor:
        """Positions of the held-out images that show how sure the model is of unseen images."""
        positions = torch.arange(len(data.held_out))
        return positions[~torch.isin(positions, self.known)]

    def without_images(self, data: Dataset) -> Tensor:
        """(K,) bool: the classes without training images that are not to be forgotten."""
        empty = torch.bincount(data.train.labels, minlength=len(data.classes)) == 0
        empty[self.classes] = False
        return empty

    @property
    def digest(self) -> str:
        """Digest of what is forgotten and what is retained."""
        parts: list[Any] = [self.kind, self.forget.tolist(), len(self.retain), self.classes, self.concepts]
        # Keys of requests without these stay as they were.
        if len(self.already):
            parts.append(self.already.tolist())
        if len(self.known):
            # Held-out positions count on from the training images, as in the keys of earlier versions.
            parts.append({"known": (self.known + self.train_images).tolist()})
        return digest(parts)


@dataclass(frozen=True)
class Earlier:
    """What earlier requests made the checkpoint forget.

    Attributes:
        positions: Positions in the training split.
        concepts: Wholly forgotten concepts.
        held_out: Positions in the held-out split, of images that come from the test split.
        told: What the user should know of it, a line each.
    """

    positions: Tensor = field(default_factory=_none)
    concepts: Sequence[int] = ()
    told: tuple[str, ...] = ()
    held_out: Tensor = field(default_factory=_none)

    def joined(self, other: Earlier) -> Earlier:
        """Both together."""
        positions = torch.cat([self.positions, other.positions]).unique()
        held_out = torch.cat([self.held_out, other.held_out]).unique()
        return Earlier(positions, sorted({*self.concepts, *other.concepts}), (*self.told, *other.told), held_out)


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
    if classes is not None:
        named = _classes(data, classes)
    elif subclasses is not None:
        named = _subclasses(data, subclasses)
    elif samples is not None or subjects is not None:
        named = _single(data, samples, subjects or [], copies, missing)
    else:
        named = _random(data, fraction, count, earlier, seed)
    mask, section = named.mask, named.section
    if not mask.any():
        raise DataError(f"the forget set is empty: forget.{section} matches no training image")
    before = torch.zeros_like(mask)
    before[earlier.positions] = True
    if not (mask & ~before).any():
        raise DataError(f"forget.{section} names nothing that forget.already does not name")
    # A list may hold all that there was of a concept: a model that never saw it does not know it.
    trained_on = data.train.concepts[~mask & ~before & data.trainable]
    emptied = {*data.train.concepts[mask | before].tolist()} - {*trained_on.unique().tolist()}
    forgotten = sorted({*named.concepts, *emptied, *earlier.concepts})
    before &= ~mask
    kept = torch.ones(len(data.concepts), dtype=torch.bool)
    kept[torch.tensor(forgotten, dtype=torch.int64)] = False
    gone = _gone(data, kept, section)
    retain = torch.where(~mask & ~before & data.trainable)[0]
    if not len(retain):
        raise DataError(f"forget.{section} leaves no training image")
    known = named.held_out.clone()
    known[earlier.held_out] = True
    excluded = known | data.held_out_among(torch.where(mask | before)[0]) | ~kept[data.held_out.concepts]
    return Request(
        kind=_kind(data, section, mask, gone, kept),
        forget=torch.where(mask)[0],
        retain=retain,
        validation=torch.where(~excluded)[0],
        classes=torch.where(gone)[0].tolist(),
        concepts=forgotten,
        asked=data.train.concepts[mask].unique().tolist(),
        already=torch.where(before)[0],
        copies=named.copies,
        known=torch.where(known)[0] if section in ("samples", "subjects") else _none(),
        train_images=len(data.train),
        section=section,
        told=(*named.told, *earlier.told),
    )


def _gone(data: Dataset, kept: Tensor, section: Kind) -> Tensor:
    """(K,) bool: classes without a concept that is kept.

    Args:
        data: The data set.
        kept: (len(concepts),) bool.
        section: Named in errors.

    Raises:
        DataError: Fewer than two classes remain.
    """
    gone = torch.ones(len(data.classes), dtype=torch.bool)
    gone[data.concept_class[kept]] = False
    if int((~gone).sum()) < 2:
        raise DataError(
            f"forget.{section} leaves {int((~gone).sum())} of {len(data.classes)} classes",
            "At least two must remain for a classifier to be one.",
        )
    return gone


def _kind(data: Dataset, section: Kind, mask: Tensor, gone: Tensor, kept: Tensor) -> Kind:
    """The kind of a request: also that of a list or a draw that holds all images of its classes or sub-classes."""
    if section != "subclasses" and gone[data.train.labels[mask]].all():
        return "classes"
    return section if kept[data.train.concepts[mask]].any() else "subclasses"


@dataclass(frozen=True)
class _Named:
    """The images that a request names.

    Attributes:
        section: The kind of the request.
        mask: (N,) bool: training images, with the copies that are forgotten with them.
        held_out: (N_h,) bool: held-out images from the test split that equal these, or show the same people.
        concepts: Wholly forgotten concepts.
        copies: Positions of copies in the training split.
        told: What the user should know, a line each.
    """

    section: Kind
    mask: Tensor
    held_out: Tensor
    concepts: Sequence[int] = ()
    copies: Tensor = field(default_factory=_none)
    told: tuple[str, ...] = ()


def _nothing(data: Dataset) -> tuple[Tensor, Tensor]:
    """Masks over the training and the held-out images that name none of them."""
    return torch.zeros(len(data.train), dtype=torch.bool), torch.zeros(len(data.held_out), dtype=torch.bool)


def _classes(data: Dataset, classes: Sequence[str | int]) -> _Named:
    taken: list[str] = []
    chosen = torch.tensor(class_positions(classes, data.classes, taken=taken), dtype=torch.int64)
    concepts = torch.where(torch.isin(data.concept_class, chosen))[0].tolist()
    told = tuple(f"forget.classes: {line}" for line in taken)
    return _Named("classes", torch.isin(data.train.labels, chosen), _nothing(data)[1], concepts, told=told)


def _subclasses(data: Dataset, subclasses: Sequence[str]) -> _Named:
    if data.concepts == data.classes:
        raise DataError("forget.subclasses needs a coarse-labelled data set", "Set data.superclasses, or use cifar20.")
    taken: list[str] = []
    concepts = class_positions(subclasses, data.concepts, taken=taken)
    mask = torch.isin(data.train.concepts, torch.tensor(concepts, dtype=torch.int64))
    told = tuple(f"forget.subclasses: {line}" for line in taken)
    return _Named("subclasses", mask, _nothing(data)[1], concepts, told=told)


def _single(
    data: Dataset,
    samples: Path | None,
    subjects: Sequence[str | int],
    copies: bool,
    missing: Literal["error", "ignore"],
) -> _Named:
    """The images of a deletion list or of people."""
    mask, held_out = _nothing(data)
    lines, matched = 0, 0
    if samples is not None:
        section: Kind = "samples"
        found = listed(samples, data, "forget.samples", missing)
        mask[found.positions], lines, matched = True, found.lines, len(found.positions)
    else:
        section = "subjects"
        mask = torch.isin(_whose(data), torch.tensor(known := _known(subjects, data), dtype=torch.int64))
        if data.borrowed and data.held_out.subjects is not None:
            held_out = torch.isin(data.held_out.subjects, torch.tensor(known, dtype=torch.int64))
    contents = data.train.images.contents()
    named = contents[mask]
    same = torch.where(torch.isin(contents, named) & ~mask)[0]
    mask[same] = copies
    if copies and data.borrowed:
        held_out = held_out | torch.isin(data.held_out.images.contents(), named)
    told = f"forget.samples: {matched:,} of {lines:,} lines matched, {int(mask.sum()):,} images with copies"
    return _Named(section, mask, held_out, copies=same, told=(told,) if lines else ())


def _random(data: Dataset, fraction: float | None, count: int | None, earlier: Earlier, seed: int) -> _Named:
    """Random images among those that `megu train` trains on: forgetting a held-out image means nothing."""
    mask, held_out = _nothing(data)
    free = data.trainable
    free[earlier.positions] = False
    trained = torch.where(free)[0]
    number = count if count is not None else round((fraction or 0) * len(trained))
    if number > len(trained):
        raise DataError(f"forget.random asks for {number} of {len(trained)} images")
    order = torch.randperm(len(trained), generator=generator(seed, "forget", "random"))
    mask[trained[order[:number]]] = True
    return _Named("random", mask, held_out)


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
