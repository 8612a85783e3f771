"""No ratings at all: every class counts as near as any other."""

from __future__ import annotations

from megu_cli.mllm.base import Cost, Question, Ratings

RATER = "nobody: every class counts as near as any other"


class Unrated:
    """Asks nobody. Labels then follow the proxy and the model's own prediction."""

    def cost(self, questions: list[Question]) -> Cost:
        """Nothing is asked."""
        return Cost(answered=len(questions))

    def rate(self, questions: list[Question]) -> Ratings:
        """Give no rating."""
        return Ratings(RATER, {}, {})
