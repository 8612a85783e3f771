"""The classes of a model and of the data set: the same names, in the model's order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megu_cli.errors import CheckpointError, ConfigError, brief


def read_names(path: Path) -> list[str]:
    """Class names from a file: a line each, or JSON: a list, or a mapping between names and positions.

    Raises:
        ConfigError: It cannot be read, or holds none.
    """
    from megu_cli.run import reading
    from megu_cli.run.artifacts import strict_json

    try:
        text = reading.content(path).decode("utf-8-sig")
        names = _of_json(strict_json(text)) if path.suffix == ".json" else list(map(str.strip, text.splitlines()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.classes: {path} cannot be read: {str(error)[:200]}",
            "It holds a class name a line, or JSON: a list, or a mapping from names to positions or back.",
        ) from None
    names = [name for name in names if name]
    if not names:
        raise ConfigError(f"model.classes: {path} holds no names")
    return names


def _of_json(content: Any) -> list[str]:
    if isinstance(content, dict):
        at = {int(v if isinstance(v, int) else k): k if isinstance(v, int) else v for k, v in content.items()}
        if sorted(at) != list(range(len(content))):
            raise ValueError("the positions are not 0, 1, 2 and so on, each once")
        content = [at[i] for i in range(len(content))]
    if not isinstance(content, list) or any(isinstance(name, (list, dict)) for name in content):
        raise ValueError("it holds something other than names")
    return [str(name) for name in content]


def match(names: Sequence[str], classes: Sequence[str], source: str, exact: bool = False) -> list[int]:
    """For each of a model's outputs the position of its class in the data.

    Args:
        names: Of the model's classes, in the order of its outputs.
        classes: Of the data's classes.
        source: Where ``names`` comes from.
        exact: Names are the same to the letter; else case, spaces, underscores and hyphens do not matter.

    Raises:
        CheckpointError: Names occur twice, or are not the same on both sides.
    """
    hint = (
        "Give the names of the data's classes, in the order of the model's outputs."
        if exact
        else "Name the folders or classes of the data as the model does, or give the data's names in the order of the "
        "model's outputs in model.classes."
    )
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise CheckpointError(f"{source}: names occur twice: {_some(twice)}", hint)
    if len(names) != len(classes):
        raise CheckpointError(f"{source} has {len(names)} classes, and the data have {len(classes)}", hint)
    position = {name: i for i, name in enumerate(classes)}
    if not exact and not position.keys() >= set(names):
        loose = {_loose(name): i for i, name in enumerate(classes)}
        if len(loose) == len(classes) == len({_loose(name) for name in names}):
            position = {name: loose[_loose(name)] for name in names if _loose(name) in loose}
    unknown = [name for name in names if name not in position]
    if unknown:
        found = {position[name] for name in names if name in position}
        rest = [name for i, name in enumerate(classes) if i not in found]
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(names)} names are no classes of the data: {_some(unknown)} (the data "
            f"have, instead: {_some(rest)})",
            hint,
        )
    return [position[name] for name in names]


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(brief, names[:5])) + (", …" if len(names) > 5 else "")
