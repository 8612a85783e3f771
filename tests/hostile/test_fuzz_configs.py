"""Configs: any text as megu.yaml, and any value for any setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from conftest import write_config
from hypothesis import strategies as st

from .conftest import PHOTOS
from .harness import call, fuzz
from .material import DEEP, NASTY, WIDE, changed, damaged

BASE: dict[str, Any] = {
    **PHOTOS,
    "seed": 3,
    "device": "cpu",
    "out": "none",
    "forget": {"samples": "delete.csv", "duplicates": "include"},
    "transition": {"temperature": 3.0},
    "noise": {"use": "auto", "steps": 3},
    "compare": {"methods": ["megu"], "settings": {"megu": {"a": 1}}},
}
# Text that no YAML writer writes.
SNIPPETS = (
    "seed: !!int x",
    "seed: !!float y",
    "seed: !!binary '@'",
    "seed: !!timestamp z",
    "seed: !!set {1, 2}",
    "seed: !!python/object/apply:os.system ['touch pwned']",
    "seed: !!python/name:os.system",
    "seed: !x y",
    "forget: {classes: [dog]}",
    "forget: &a [*a]",
    "a: &a {<<: *a}",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: *b",
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "<<: {seed: 4}",
    "<<: 5",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "seed: " + "9" * 5000,
    "seed: 1e999",
    "seed: .nan",
    "[" * 3000,
    "{" * 3000,
    "- " * 2000,
    "a: " * 2000,
    "%YAML 9.9\n---",
    "---\n---",
    "...",
    "\t",
    "\x00",
    "\ufeff",
    "'",
    '"\\xff"',
    '"\\ud800"',
    "|",
    ">9",
    "@",
    "`",
    "null: 1",
    "1: 1",
    "true: 1",
    "seed: 2026-11-25",
)


def _outside(value: Any) -> bool:
    """Whether a value may name a folder of this machine as the images: to read all of it is what the config says."""
    if isinstance(value, dict):
        return any(map(_outside, value.values()))
    if isinstance(value, list):
        return any(map(_outside, value))
    return isinstance(value, str) and value not in NASTY and (value.startswith(("/", "~", ".")) or "hf:" in value)


def as_yaml(tree: Any) -> str:
    text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    return text.replace(DEEP, "[" * 500 + "]" * 500).replace(WIDE, f"[{'0,' * 5000}0]")


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A config with odd values, odd lines, or damaged bytes."""
    kind = draw(st.sampled_from(("values", "values", "lines", "bytes", "anything")))
    if kind == "values":
        return as_yaml(draw(changed(BASE).filter(lambda tree: not _outside(tree)))).encode("utf-8", "replace")
    text = as_yaml(BASE)
    if kind == "lines":
        lines = text.splitlines()
        for snippet in draw(st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=2)):
            lines.insert(draw(st.integers(0, len(lines))), snippet)
        return "\n".join(lines).encode("utf-8", "replace")
    if kind == "bytes":
        return draw(damaged(text.encode()))
    return draw(st.sampled_from(SNIPPETS).map(str.encode) | st.binary(max_size=40))


@fuzz(content=configs())
def test_configs(photos: Path, content: bytes) -> None:
    file = photos / "odd.yaml"
    file.write_bytes(content)
    call("similarity", "--dry-run", "-c", file, user=photos, run=photos / "none")
    assert not (photos / "pwned").exists()


KEYS = (
    "seed",
    "out",
    "noise.steps",
    "forget",
    "forget.classes",
    "data",
    "data.root",
    "mllm.ratings",
    "x",
    "",
    ".",
    "a..b",
)


@fuzz(key=st.sampled_from(KEYS), value=st.sampled_from((*SNIPPETS, *NASTY)))
def test_settings_on_the_command_line(photos: Path, key: str, value: str) -> None:
    write_config(photos, **BASE)
    call(
        "similarity",
        "--dry-run",
        "-c",
        photos / "megu.yaml",
        "--set",
        f"{key}={value}",
        user=photos,
        run=photos / "none",
    )
