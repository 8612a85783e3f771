"""Text of others as people see it: a class may be called anything, an escape sequence of the terminal as well."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# Controls, marks that turn the direction of text, what has no width, halves of characters. JSON stays as it is.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_MARKDOWN = re.compile(r"`[\w ./=:-]+`|[\\`*\[\]<|~&]|(?<!\w)_|_(?!\w)")


def printable(text: str) -> str:
    """The text with characters escaped that do not show themselves; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _HIDDEN and c != "\n" else c for c in text
    )


def inline(text: str) -> str:
    """The text as `printable` shows it, and in one line: a name forges no line of ours."""
    return printable(text).replace("\n", "\\n")


def short(text: str, most: int = 60) -> str:
    """The text as a label of a figure: a longer one would be most of the picture."""
    return text if len(text) <= most else text[: most - 1] + "…"


# What megu itself says, in lines of its own.
_PROSE = frozenset(("reason", "note", "failed"))


def shown(data: Any) -> Any:
    """JSON data for people: every string in it as `inline` has it, keys as well; two that differ still do."""
    names: dict[str, str] = {}
    taken: dict[str, str] = {}

    def name(text: str) -> str:
        if text not in names:
            seen = inline(text)
            while taken.setdefault(seen, text) != text:
                seen += "'"
            names[text] = seen
        return names[text]

    def part(value: Any) -> Any:
        if isinstance(value, str):
            return name(value)
        if isinstance(value, dict):
            return {name(key) if isinstance(key, str) else key: item if key in _PROSE else part(item)
                    for key, item in value.items()}  # fmt: skip
        return [part(item) for item in value] if isinstance(value, (list, tuple)) else value

    return part(data)


def markdown(text: str) -> str:
    """The text as Markdown that shows it: no tag, link or picture comes of a name. `Code` of our own stays."""

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if len(found) > 1 else {"<": "&lt;", "&": "&amp;"}.get(found, f"\\{found}")

    return _MARKDOWN.sub(escaped, inline(text))
