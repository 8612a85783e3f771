"""What one call asks a chat server, and how the answer is read; a class for each value of ``mllm.question``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from megu_cli.mllm import completion
from megu_cli.mllm.base import SCALE, chat_prompt, parse, schema, true_false_prompt, without_thoughts

# Names rated in one call.
CHUNK = 50
# Alternatives to a token whose probabilities are asked for: some servers give no more.
_ALTERNATIVES = 5
_WORD = re.compile(r"\W*(true|false)\b", re.IGNORECASE)


class Chat(Protocol):
    """One value of ``mllm.question``.

    Attributes:
        chunk: Names asked about in one call.
    """

    chunk: int

    def prompt(self, concept: str, candidates: Sequence[str], shown: bool, again: bool = False) -> str:
        """The question; see `megu_cli.mllm.base.chat_prompt`."""

    def options(self, candidates: Sequence[str]) -> dict[str, Any]:
        """Parts of the request that make the answer easier to read; a server may refuse them."""

    def length(self, candidates: Sequence[str]) -> int:
        """Tokens that an answer is given."""

    def read(self, body: bytes, candidates: Sequence[str], names: Sequence[str]) -> dict[str, float]:
        """The ratings that an answer holds; see `megu_cli.mllm.base.parse`."""


class AsRatings:
    """Ratings of up to `CHUNK` candidates, as one JSON object."""

    chunk = CHUNK

    def prompt(self, concept: str, candidates: Sequence[str], shown: bool, again: bool = False) -> str:
        """See `Chat.prompt`."""
        return chat_prompt(concept, candidates, shown, again)

    def options(self, candidates: Sequence[str]) -> dict[str, Any]:
        """See `Chat.options`."""
        form = {"name": "ratings", "strict": True, "schema": schema(candidates)}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    def length(self, candidates: Sequence[str]) -> int:
        """See `Chat.length`."""
        return 512 + sum(16 + len(name) for name in candidates)

    def read(self, body: bytes, candidates: Sequence[str], names: Sequence[str]) -> dict[str, float]:
        """See `Chat.read`."""
        return parse(completion.text(body), candidates, names)


class AsTrueFalse:
    """True or False for one candidate: its rating is 10 P(True) / (P(True) + P(False)).

    The probabilities are those of the token that is the answer, after the thoughts of a model that has them, its
    spellings taken together. Where a server does not give them, True is 10 and False 0, and the mean over images is the
    share of True.
    """

    chunk = 1

    def prompt(self, concept: str, candidates: Sequence[str], shown: bool, again: bool = False) -> str:
        """See `Chat.prompt`."""
        return true_false_prompt(concept, candidates[0], shown, again)

    def options(self, candidates: Sequence[str]) -> dict[str, Any]:
        """See `Chat.options`."""
        return {"logprobs": True, "top_logprobs": _ALTERNATIVES}

    def length(self, candidates: Sequence[str]) -> int:
        """See `Chat.length`."""
        return 512  # for the thoughts of a model that has them; another stops after the word

    def read(self, body: bytes, candidates: Sequence[str], names: Sequence[str]) -> dict[str, float]:
        """See `Chat.read`."""
        said = _WORD.match(without_thoughts(completion.text(body)))
        if not said:
            return {}
        word = said[1].lower()
        likely = {"true": float(word == "true"), "false": float(word == "false")}
        for said_token, place in completion.after_thoughts(completion.probabilities(body)):
            found = dict.fromkeys(likely, 0.0)
            for token, probability in place.items():
                if (spelt := token.strip().lower()) in found:
                    found[spelt] += probability
            if said_token.strip().lower() == word and found[word]:
                likely = found
                break
        return {candidates[0]: SCALE[1] * likely["true"] / (likely["true"] + likely["false"])}


CHATS: dict[str, Chat] = {"rating": AsRatings(), "true_false": AsTrueFalse()}
