"""The methods that a comparison knows: the baselines, and the method itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megu_cli.baselines import methods
from megu_cli.config import preset_settings
from megu_cli.errors import ConfigError

# MeGU runs through its own stages: its settings are the config's.
OURS: dict[str, dict[str, Any]] = {"megu": {}, "megu-paper": preset_settings("paper")}


def chosen(names: Sequence[str] | None, rated: bool = True) -> list[str]:
    """The names of the methods to run, all of them for ``None``.

    Args:
        names: Of the methods.
        rated: Whether there are ratings; megu-paper needs them.

    Raises:
        ConfigError: There is no such method, or it needs ratings and there are none.
    """
    known = ["original", "retrain", *OURS, *(name for name in methods() if name not in ("original", "retrain"))]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ConfigError(f"there is no method {', '.join(unknown)}", f"Known: {', '.join(known)}.")
    if not rated and names and "megu-paper" in names:
        raise ConfigError(
            "megu-paper takes labels from ratings, and there are none (mllm.backend: none)",
            "Fill in the file that `megu similarity --template FILE` writes and name it in mllm.ratings.",
        )
    if not rated:
        known.remove("megu-paper")
    return known if names is None else list(dict.fromkeys(names))
