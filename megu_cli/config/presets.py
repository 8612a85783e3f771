"""Presets: settings under a name, beneath what the config file gives."""

from __future__ import annotations

from typing import Any

# What the paper's method is without our additions; a user's own keys still win over these.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
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
}


def preset_settings(name: str) -> dict[str, Any]:
    """Dotted key -> value of a preset."""
    return {f"{section}.{key}": value for section, keys in PRESETS[name].items() for key, value in keys.items()}
