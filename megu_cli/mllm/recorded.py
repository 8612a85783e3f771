"""Recorded ratings: replayed from a file, so that a run can be repeated, reviewed, or edited by hand."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megu_cli.config.raters import ASKING
from megu_cli.errors import DataError, brief
from megu_cli.mllm.base import SCALE, Cost, Question, Ratings
from megu_cli.run import reading
from megu_cli.run.artifacts import strict_json

if TYPE_CHECKING:
    from megu_cli.mllm.backends import Setup

# Classes without a rating that an error names.
_NAMED = 5


class _File(BaseModel):
    """What is read of a file of ratings."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    classes: list[str]
    scores: dict[str, dict[str, Annotated[float, Field(ge=SCALE[0], le=SCALE[1])]]]
    rater: str
    # Where the ratings come from: handed on as it is.
    date: Any = None
    evidence: Any = None
    question: Any = None
    prompt: Any = None
    scale: Any = None
    images: Any = None
    missing: dict[str, list[str]] = {}


class Recorded:
    """Ratings from a JSON file with ``classes``, ``scores`` and ``rater``, as `megu similarity` itself writes them.

    Raises:
        DataError: The file is missing, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = reading.content(path)
            strict_json(raw)  # what pydantic would let through
            content = _File.model_validate_json(raw)
        except (OSError, ValueError) as error:
            raise DataError(
                f"recorded ratings {path}: {_reason(error)}",
                "Give a JSON file with classes, scores and rater (see docs/mllm.md), as similarity.json is one.",
            ) from None
        self.classes, self.scores, self.rater = content.classes, content.scores, content.rater
        self.provenance: dict[str, Any] = content.model_dump(exclude={"classes", "scores", "rater"}, exclude_unset=True)

    @classmethod
    def of(cls, setup: Setup) -> Recorded:
        """Return the rater of a run."""
        return cls(setup.ratings())

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
                faults.append(f"no row for {brief(question.concept)}")
            elif missing:
                named = ", ".join(map(brief, missing[:_NAMED]))
                more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
                faults.append(f"row {brief(question.concept)} has no rating of {named}{more}")
        if faults:
            rated = ", ".join(name[:200] for name in self.classes[:50]) + (", …" if len(self.classes) > 50 else "")
            more = f"; and {len(faults) - _NAMED} more rows" if len(faults) > _NAMED else ""
            raise DataError(
                f"recorded ratings {self.path.name}: {'; '.join(faults[:_NAMED])}{more}",
                f"It rates: {rated}. Add what is missing, set mllm.ratings to another file, or do without ratings: "
                "mllm.backend: none.",
            )
        scores = {
            q.concept: {c: float(self.scores[q.concept][c]) for c in q.candidates if c in self.scores[q.concept]}
            for q in questions
        }
        return Ratings(self.rater, scores, self.provenance)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if not isinstance(error, ValidationError):
        return str(error)
    told = []
    for fault in error.errors(include_url=False):
        place = "".join(f"{part} / " for part in fault["loc"]).removesuffix(" / ")
        got = f" (got {brief(fault['input'])})" if isinstance(fault["input"], (int, float, str)) and place else ""
        told.append(f"{place}: {fault['msg'].lower()}{got}".removeprefix(": "))
    return "; ".join(told[:5]) + ("; …" if len(told) > 5 else "")


def shipped(dataset: str) -> Path:
    """The recorded ratings that come with megu for a data set.

    Raises:
        DataError: There are none.
    """
    path = Path(str(files("megu_cli.mllm") / "ratings" / f"{dataset}.json"))
    if not path.exists():
        raise DataError(
            f"mllm.backend: recorded ships no ratings for {dataset}",
            f"Do without ratings (mllm.backend: none), let a model rate ({ASKING}), or fill in the file "
            "that `megu similarity --template FILE` writes and name it in mllm.ratings (docs/mllm.md).",
        )
    return path
