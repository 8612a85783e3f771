"""What a report is made of: sections of words, tables and figures, and what they are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from megu_cli.evaluation.requirements import Outcome
from megu_cli.report.words import MODELS
from megu_cli.run.artifacts import Artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from megu_cli.report.drawing import Look

_NEAREST = 3


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        head: Its columns.
        rows: Its cells.
        marked: Positions of the rows to set off.
        bold: Position of the column to set off.
        folded: Shown on demand, since a figure shows the same.
    """

    head: list[str]
    rows: list[list[str]]
    marked: list[int] = field(default_factory=list)
    bold: int | None = None
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure, and what it shows in words for those who do not see it."""

    draw: Callable[[Look], Drawing]
    alt: str


@dataclass(frozen=True)
class Section:
    """One section: plain words first, then what shows it, then the details.

    Attributes:
        id: Its anchor.
        title: Its heading.
        lead: Plain words, for everyone.
        detail: How it was measured, for engineers.
        figures: What shows it.
        tables: The same in figures.
    """

    id: str
    title: str
    lead: str
    detail: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """One headline figure: before, now, and what retraining gives."""

    label: str
    before: str
    now: str
    target: str


@dataclass(frozen=True)
class Report:
    """The whole report.

    Attributes:
        title: What was forgotten.
        facts: Name and value of what the request was.
        summary: Sentences that say how it went.
        verdict: ``forgotten``, ``not forgotten`` or ``undecided``.
        requirements: ``met``, ``not met`` or ``none required``.
        tiles: Headline figures.
        sections: The rest.
        limits: What the report does not show.
        notices: What the reader must know about this report.
        shows_forgotten: Whether it shows forgotten images.
        metrics: Model -> metric -> value, as eval.json has them.
    """

    title: str
    facts: list[tuple[str, str]]
    summary: list[str]
    verdict: str
    requirements: str
    tiles: list[Tile]
    sections: list[Section]
    limits: list[tuple[str, str]]
    notices: list[str]
    shows_forgotten: bool
    metrics: dict[str, Any]
    megu: str


@dataclass(frozen=True)
class Sources:
    """What a report is made from.

    Attributes:
        evaluation: eval.json.
        artifacts: Of the other stages, those that are there and belong to this evaluation.
        outcomes: The requirements, and what was measured.
        files: (file, bytes, sha256) of what lies in the run directory.
        finished: When the evaluation was made, where that is known.
        shown: Forgotten images to show, as (image (C, H, W) from 0 to 1, class, perturbing label); empty: show none.
        scale: (C, 1, 1), one unit of noise in units of the image.
        notices: What the reader must know.
        comparison: compare.json, where it is there and about the same request.
        asked: The request as the config has it.
        model: The model by name.
        bgr: The model takes blue, green, red, and so the noises are.
    """

    evaluation: Artifact
    artifacts: Mapping[str, Artifact]
    outcomes: Sequence[Outcome]
    files: Sequence[tuple[str, int, str]]
    finished: str = ""
    shown: Sequence[tuple[np.ndarray[Any, Any], int, int]] = ()
    scale: np.ndarray[Any, Any] | float = 1.0
    notices: Sequence[str] = ()
    comparison: Artifact | None = None
    asked: str = ""
    model: str = ""
    bgr: bool = False


@dataclass(frozen=True)
class View:
    """An evaluation as the sections look at it.

    Attributes:
        body: Of eval.json.
        models: Those that are shown, in order.
        classes: Names of the classes.
        sources: All that the report is made from.
    """

    body: dict[str, Any]
    models: list[str]
    classes: list[str]
    sources: Sources

    @property
    def retrained_by(self) -> str | None:
        """Who retrained the model, as in `evaluation.measure.evaluated`; ``None``: it was unlearned."""
        return self.body.get("retrained_by")

    @property
    def names(self) -> dict[str, str]:
        """What the models are called."""
        return {**MODELS, "unlearned": MODELS["oracle"]} if self.retrained_by else MODELS

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for."""
        return self.body["request"]  # type: ignore[no-any-return]

    @property
    def verdict(self) -> dict[str, Any]:
        """The verdict; undecided in an evaluation by an older version of megu."""
        older = {"verdict": "undecided", "reason": "this evaluation was made by an older megu.", "checks": []}
        found: dict[str, Any] = self.body.get("verdict", older)
        return found

    @property
    def forgotten(self) -> list[int]:
        """The wholly forgotten classes."""
        return [self.classes.index(name) for name in self.request["classes"]]

    @cached_property
    def shown(self) -> list[int]:
        """The classes that have training or test images; a model may have outputs for others."""
        told = self.body["per_class"]["original"]
        return [c for c, name in enumerate(self.classes) if (told["train"][name], told["test"][name]) != (None, None)]

    @property
    def whole(self) -> bool:
        """Whether classes or sub-classes are forgotten, rather than images out of many classes."""
        return self.request["kind"] in ("classes", "subclasses")

    def value(self, model: str, name: str) -> float | None:
        """A metric of a model; ``None`` where there is none."""
        own: dict[str, float | None] = self.body.get(model, {})
        return own[name] if name in own else self.body["comparison"].get(model, {}).get(name)

    def near(self) -> dict[int, str]:
        """The retained classes nearest to what is forgotten, nearest first, each with its rating."""
        transition, similarity = (self.sources.artifacts.get(name) for name in ("transition", "similarity"))
        if transition is None or not self.whole or (similarity is not None and not similarity.body["scores"]):
            return {}  # without ratings every class is as near as any other
        weights = transition.tensors["transition"].mean(0)
        # Of three classes not all can be the nearest.
        most = max(1, min(_NEAREST, (len(self.shown) - len(self.forgotten)) // 2))
        order = sorted(self.shown, key=lambda c: -float(weights[c]))[:most]
        rating = self.ratings
        notes = {}
        for c in order:
            values = [row[self.classes[c]] for row in rating.values() if self.classes[c] in row]
            if float(weights[c]) > 0:
                notes[c] = f"rated {max(values):.3g}" if values else "near"
        return notes

    @property
    def ratings(self) -> dict[str, dict[str, float]]:
        """Forgotten concept -> class -> rating."""
        similarity = self.sources.artifacts.get("similarity")
        return dict(similarity.body["scores"]) if similarity else {}
