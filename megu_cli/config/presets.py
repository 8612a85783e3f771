"""Presets: settings under a name, beneath what the config file gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Preset:
    """One value of ``preset``.

    Attributes:
        version: Raised when its settings change.
        text: What it is, in the description of the setting and before a run.
        settings: Section -> setting -> value.
    """

    version: int
    text: str
    settings: dict[str, dict[str, Any]]


# What the paper's method is without our additions; a user's own keys still win over these.
_PAPER_ADDED: dict[str, dict[str, Any]] = {
    "labels": {"source": "transition+prediction", "mode": "hard"},
    "noise": {"use": "both", "negative": "away"},
    "finetune": {
        "epochs": 2,
        "reassign": False,
        "clean": 0.0,
        "adversary": 0.0,
        "distillation": 0.0,
        "calibrate": False,
        "lr": 0.02,
    },
}
PRESETS = {
    "paper": Preset(
        2,
        "the paper's method without what is ours; a model is asked True or False, and noises are trained alone",
        {**_PAPER_ADDED, "mllm": {"question": "auto"}, "noise": {**_PAPER_ADDED["noise"], "input": "alone"}},
    ),
    "paper-added": Preset(
        1, "version 1 of paper: a model is asked for ratings, and noises are trained on images", _PAPER_ADDED
    ),
}

# The values of ``preset``.
_NAMES = tuple(PRESETS)
if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[_NAMES]


def preset_settings(name: str) -> dict[str, Any]:
    """Dotted key -> value of a preset."""
    sections = PRESETS[name].settings.items()
    return {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
