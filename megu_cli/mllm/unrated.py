"""No ratings at all: every class counts as near as any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megu_cli.mllm.base import Cost, Question, Ratings

if TYPE_CHECKING:
    from megu_cli.mllm.backends import Setup

RATER = "nobody: every class counts as near as any other"


class Unrated:
    """Asks nobody. Labels then follow the proxy and the model's own prediction."""

    @classmethod
    def of(cls, setup: Setup) -> Unrated:
        """Return the rater of a run."""
        return cls()

    def cost(self, questions: list[Question]) -> Cost:
        """Nothing is asked."""
        return Cost(answered=len(questions))

    def rate(self, questions: list[Question]) -> Ratings:
        """Give no rating."""
        return Ratings(RATER, {}, {})
