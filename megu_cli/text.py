"""Text of others as people see it: a class may be called anything, an escape sequence of the terminal as well."""

from __future__ import annotations

import re
import unicodedata

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


def markdown(text: str) -> str:
    """The text as Markdown that shows it: no tag, link or picture comes of a name. `Code` of our own stays."""

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if len(found) > 1 else {"<": "&lt;", "&": "&amp;"}.get(found, f"\\{found}")

    return _MARKDOWN.sub(escaped, printable(text))
