"""What every similarity backend is given, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

SCALE = (0.0, 10.0)


@dataclass(frozen=True)
class Question:
    """One row of ratings: how similar is ``concept`` to each of ``candidates``?

    Attributes:
        concept: Name of the concept that is to be forgotten.
        candidates: Names of the retained concepts, in the data set's order.
        positions: Positions of images of the concept in the training split that may be shown to a model.
    """

    concept: str
    candidates: list[str]
    positions: list[int]


@dataclass(frozen=True)
class Ratings:
    """Answers to all questions.

    Attributes:
        rater: Who or what gave the ratings.
        scores: concept -> candidate -> rating on `SCALE`.
        provenance: What else is known of how they came about.
    """

    rater: str
    scores: dict[str, dict[str, float]]
    provenance: dict[str, Any]


class Backend(Protocol):
    """Gives ratings."""

    def rate(self, questions: list[Question]) -> Ratings:
        """Answer all questions; nothing is filled in that was not answered.

        Raises:
            MLLMError: The backend failed, or what it said carries no information.
            InputError: What the user gave it is at fault.
        """
