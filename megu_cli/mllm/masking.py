"""Keys are masked in text from outside, however they are written there."""

from __future__ import annotations

import base64
import html
import os
import re
from bisect import bisect_right
from dataclasses import dataclass

from megu_cli.config import MLLMConfig

MASK = "[key]"
# A shorter key is no secret but a filler for servers that want some key, and may be part of any word.
_SECRET = 6
# Characters at either end of a key that are masked by themselves: servers quote keys shortened.
_END = 8
# Escapes within escapes: a text with more layers is masked as a whole.
_LAYERS = 16
# A character written otherwise: by JSON or JavaScript (any number of backslashes, as each layer doubles them), in an
# address, in HTML; and the zeros of UTF-16.
_ESCAPE = re.compile(
    r"(?<!\\)\\+(?:(?:u00|x)(?P<json>[0-9a-fA-F]{2})|(?P<plain>[^\\]))|%(?:u00)?(?P<percent>[0-7][0-9a-fA-F])"
    r"|&#0*(?P<decimal>[1-9][0-9]{0,2})(?![0-9]);?|&#[xX]0*(?P<hex>[1-9a-fA-F][0-9a-fA-F]?)(?![0-9a-fA-F]);?"
    r"|(?P<entity>&[A-Za-z][A-Za-z0-9]{1,31};?)|(?P<zeros>\x00+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Key:
    """The key of a server.

    Attributes:
        value: The key; empty or ``None`` without one.
        variable: The environment variable that it comes from, for messages.
        needed: Whether there must be one.
    """

    value: str | None
    variable: str
    needed: bool = False

    @classmethod
    def of(cls, settings: MLLMConfig) -> Key:
        """Return the key in the environment variable that ``mllm.key_env`` names; one of the user's must be there."""
        needed = settings.key_env != MLLMConfig.model_fields["key_env"].default
        return cls(os.environ.get(settings.key_env, "").strip(), settings.key_env, needed)


def masked(text: str, key: str) -> str:
    """A text with `MASK` in place of everything that decodes to the key.

    That is the key itself, its base64, and its first or last eight characters: as they are, or in escapes of JSON,
    percent signs or HTML entities, one within the other.

    Args:
        text: From outside.
        key: The key; one of fewer than six characters is not masked.
    """
    if len(key) < _SECRET:
        return text
    layers = _layers(text)
    if len(layers) > _LAYERS:
        return MASK
    needles = _needles(key)
    found = []
    for depth, layer in enumerate(layers):
        for needle in needles:
            place = layer.text.find(needle)
            while place >= 0:
                start, end = place, place + len(needle)
                for below in reversed(layers[1 : depth + 1]):
                    start, end = below.source(start, end)
                found.append((start, end))
                place = layer.text.find(needle, place + len(needle))
    parts, done = [], 0
    for start, end in _united(found):
        parts += [text[done:start], MASK]
        done = end
    return "".join([*parts, text[done:]])


@dataclass(frozen=True)
class _Layer:
    """A text with one layer of escapes taken off.

    Attributes:
        text: What remains.
        escapes: For each escape: its place here, its length here, its place below, its length below.
    """

    text: str
    escapes: list[tuple[int, int, int, int]]

    def source(self, start: int, end: int) -> tuple[int, int]:
        """Where a span of characters stands in the text below."""
        return self._below(start)[0], self._below(end - 1)[1]

    def _below(self, place: int) -> tuple[int, int]:
        number = bisect_right(self.escapes, (place, 1 << 60, 0, 0)) - 1
        if number < 0:
            return place, place + 1
        here, length, below, width = self.escapes[number]
        if place < here + length:
            return below, below + width
        shifted = place - here - length + below + width
        return shifted, shifted + 1


def _layers(text: str) -> list[_Layer]:
    """The text, and what remains of it as the layers of escapes come off; one too many where there are too many."""
    layers = [_Layer(text, [])]
    while len(layers) <= _LAYERS:
        last = layers[-1].text
        parts: list[str] = []
        escapes: list[tuple[int, int, int, int]] = []
        done = length = 0
        for match in _ESCAPE.finditer(last):
            character = _character(match)
            if character == match[0]:
                continue
            length += match.start() - done
            escapes.append((length, len(character), match.start(), len(match[0])))
            parts += [last[done : match.start()], character]
            done = match.end()
            length += len(character)
        if not escapes:
            break
        layers.append(_Layer("".join([*parts, last[done:]]), escapes))
    return layers


def _character(match: re.Match[str]) -> str:
    kind, value = match.lastgroup, match[match.lastgroup or 0]
    if kind in ("json", "percent", "hex"):
        return chr(int(value, 16))
    if kind == "decimal":
        return chr(int(value))
    if kind == "entity":
        return html.unescape(value)
    return value if kind == "plain" else ""


def _needles(key: str) -> set[str]:
    """What is looked for, as it is and with its own escapes taken off."""
    forms = {key, key[:_END], key[-_END:]}
    for before in range(3):  # the key may stand behind other bytes: "user:key"
        coded = base64.b64encode(b"\0" * before + key.encode()).decode().rstrip("=")
        whole = coded[(0, 2, 3)[before] : len(coded) - ((before + len(key.encode())) % 3 > 0)]
        forms |= {whole, whole.replace("+", "-").replace("/", "_")}
    forms |= {layer.text for form in set(forms) for layer in _layers(form)}
    return {form for form in forms if len(form) >= _SECRET}


def _united(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch as one."""
    united: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((start, end))
    return united
