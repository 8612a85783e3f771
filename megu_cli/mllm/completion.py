"""What is read of the body of a chat completion."""

from __future__ import annotations

import base64
import itertools
import json
import math
from typing import Any

from megu_cli.mllm.base import END_OF_THOUGHTS


def unpacked(entry: dict[str, Any]) -> bytes:
    """The body of an answer as it was kept."""
    if "body" in entry:
        return str(entry["body"]).encode()
    return base64.b64decode(entry["body_base64"])


def text(body: bytes) -> str:
    """The assistant's words in the body of a chat completion; empty where there are none."""
    try:
        message = _decoded(body)["choices"][0]["message"]
        content = message.get("content") or message.get("refusal") or ""
    except (LookupError, TypeError, AttributeError):
        return ""
    if isinstance(content, list):  # some servers answer in parts
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


Place = tuple[str, dict[str, float]]


def probabilities(body: bytes) -> list[Place]:
    """Tokens of the answer, each with the probabilities of itself and its alternatives; none if a server is silent."""
    found = []
    try:
        for place in _decoded(body)["choices"][0]["logprobs"]["content"]:
            likely = {}
            for entry in (place, *(place.get("top_logprobs") or ())):
                token, value = entry["token"], entry["logprob"]
                if isinstance(token, str) and type(value) in (int, float) and value <= 0:
                    likely[token] = math.exp(value)
            found.append((str(place["token"]), likely))
    except (LookupError, TypeError, AttributeError):
        return []
    return found


def after_thoughts(places: list[Place]) -> list[Place]:
    """The tokens after the last end of thoughts; all of them where there is none."""
    said = "".join(token for token, _ in places)
    start = said.rfind(END_OF_THOUGHTS) + len(END_OF_THOUGHTS) if END_OF_THOUGHTS in said else 0
    ends = itertools.accumulate(len(token) for token, _ in places)
    return [place for place, end in zip(places, ends, strict=True) if end > start]


def tokens(body: bytes) -> dict[str, int | None] | None:
    """Token counts as the server reports them; what is no count is left out."""
    try:
        usage = _decoded(body)["usage"]
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (LookupError, TypeError, AttributeError):
        return None
    given, written = (c if type(c) is int and 0 <= c < 1 << 53 else None for c in counts)
    return {"in": given, "out": written}


def _decoded(body: bytes) -> Any:
    """The JSON in a body; ``None`` where there is none."""
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError):
        return None
