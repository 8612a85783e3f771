"""What hostile inputs are made of: odd values, odd names, and changes to trees and bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

# Names and texts that have been at fault in this or other programs.
NASTY = (
    "",
    " ",
    ".",
    "..",
    "../..",
    "../secret.png",
    "/dev/zero",
    "/etc/passwd",
    "~",
    "~nosuchuser/x",
    "-",
    "--force",
    "null",
    "true",
    "nan",
    "-1",
    "1e999",
    "0x10",
    "9" * 5000,
    "$$",
    "$\\frac$",
    "$HOME",
    "`id`",
    "$(touch pwned)",
    "; touch pwned",
    "%s%n",
    "{0.__class__}",
    "{{7*7}}",
    "<script>alert(1)</script>",
    "![x](http://example.invalid/x.png)",
    "[bold red]x[/bold red]",
    "[/]",
    "\x1b[2J\x1b]0;x\x07",
    "\x9b31m",
    "\r\nerror: x",
    "\x00",
    "\ufeff",
    "\u202egnp.exe",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "e\u0301",
    "\u00e9",
    "a" * 300,
    "a" * 5000,
    'x {"b": 9}',
    "=cmd|' /C calc'!A0",
    "CON",
    "__proto__",
    "__metadata__",
    "meta",
)
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, -0.0, float("nan"), float("inf"))
# Stand in a tree where the text has something that no JSON writer writes.
DEEP, WIDE = "@deep@", "@wide@"


def texts(surrogates: bool = False) -> st.SearchStrategy[str]:
    """Odd texts."""
    categories = () if surrogates else ("Cs",)
    anything = st.text(st.characters(exclude_categories=categories), max_size=12)
    return st.one_of(st.sampled_from(NASTY), anything)


def junk() -> st.SearchStrategy[Any]:
    """Values of any JSON type, where another type was expected."""
    scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-9, 9), texts())
    several = st.lists(scalars, max_size=4) | st.dictionaries(texts(), scalars, max_size=3)
    return st.one_of(scalars, several, st.sampled_from(({}, [], [[]], {"": {}}, DEEP, WIDE)))


def as_json(tree: Any) -> str:
    """JSON of a tree, with what stands for deep nesting and for a very long list put in."""
    text = json.dumps(tree, ensure_ascii=False)
    return text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).replace(f'"{WIDE}"', f"[{'0,' * 20000}0]")


@st.composite
def changed(draw: st.DrawFn, tree: Any, most: int = 3) -> Any:
    """A tree of mappings, lists and scalars in which up to ``most`` nodes are replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(tree))
        at = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if not at:
            tree = draw(junk()) if action == "replace" else tree
            continue
        holder = tree
        for key in at[:-1]:
            holder = holder[key]
        if action == "replace":
            holder[at[-1]] = draw(junk())
        elif action == "remove":
            del holder[at[-1]]
        elif isinstance(holder, dict):
            holder[draw(texts())] = draw(junk())
        else:
            holder.insert(0, draw(junk()))
    return tree


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Any:
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:8]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*at, key))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with bits flipped, a part cut out, or something put in."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not result:
            break
        # Headers stand at the beginning of all formats: that half of the changes is made there.
        end = min(len(result), draw(st.sampled_from((16, 300, len(result)))))
        at = draw(st.integers(0, end - 1))
        action = draw(st.sampled_from(("flip", "flip", "set", "cut", "end", "insert")))
        if action == "flip":
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "set":
            result[at] = draw(st.sampled_from((0, 0x22, 0x5B, 0x7B, 0xFF)))
        elif action == "cut":
            del result[at : at + draw(st.integers(1, 64))]
        elif action == "end":
            del result[at:]
        else:
            result[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(result)
