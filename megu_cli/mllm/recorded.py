"""Recorded ratings: replayed from a file, so that a run can be repeated, reviewed, or edited by hand."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from megu_cli.errors import DataError
from megu_cli.mllm.base import SCALE, Cost, Question, Ratings

_PROVENANCE = ("date", "evidence", "question", "prompt", "scale", "images", "missing")


class Recorded:
    """Ratings from a JSON file with ``classes``, ``scores`` and ``rater``, as `megu similarity` itself writes them.

    Raises:
        DataError: The file is missing, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.classes: list[str] = content["classes"]
            self.scores: dict[str, dict[str, float]] = content["scores"]
            self.rater: str = content["rater"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"recorded ratings {path}: {reason}",
                "Set mllm.ratings to a JSON file with classes, scores and rater (see docs/config.md).",
            ) from None
        self.provenance: dict[str, Any] = {key: content[key] for key in _PROVENANCE if key in content}
        self._check()

    def cost(self, questions: list[Question]) -> Cost:
        """Nothing is asked."""
        return Cost(answered=len(questions))

    def rate(self, questions: list[Question]) -> Ratings:
        """Look the rows up.

        Raises:
            DataError: A concept or a candidate is not in the file, and the file does not say itself, under
                ``missing``, that the rater gave no such rating; all that are missing are named.
        """
        known_missing = self.provenance.get("missing", {})
        faults = []
        for question in questions:
            row = self.scores.get(question.concept)
            declared = known_missing.get(question.concept, [])
            missing = [c for c in question.candidates if c not in (row or {}) and c not in declared]
            if row is None:
                faults.append(f"no row for {question.concept!r}")
            elif missing:
                faults.append(f"row {question.concept!r} has no rating of {', '.join(map(repr, missing))}")
        if faults:
            raise DataError(
                f"recorded ratings {self.path.name}: {'; '.join(faults)}",
                f"It rates: {', '.join(self.classes)}. Add what is missing, or set mllm.ratings to another file.",
            )
        scores = {
            q.concept: {c: float(self.scores[q.concept][c]) for c in q.candidates if c in self.scores[q.concept]}
            for q in questions
        }
        return Ratings(self.rater, scores, self.provenance)

    def _check(self) -> None:
        low, high = SCALE
        for concept, row in self.scores.items():
            for candidate, rating in row.items():
                if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not low <= rating <= high:
                    raise DataError(
                        f"recorded ratings {self.path}: {concept} / {candidate} is {rating!r}, "
                        f"not a number from {low:g} to {high:g}"
                    )


def shipped(dataset: str) -> Path:
    """The recorded ratings that come with megu for a data set.

    Raises:
        DataError: There are none.
    """
    path = Path(str(files("megu_cli.mllm") / "ratings" / f"{dataset}.json"))
    if not path.exists():
        raise DataError(
            f"mllm.backend: recorded ships no ratings for {dataset}",
            "Set mllm.ratings to a file of recorded ratings.",
        )
    return path
