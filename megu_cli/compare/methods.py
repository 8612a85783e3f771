"""The methods that a comparison knows: the baselines, the method itself, and variants of both with other settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megu_cli.baselines import methods
from megu_cli.config import Config, changed, get, preset_settings
from megu_cli.errors import ConfigError, brief
from megu_cli.pipeline.stages import STAGES

# MeGU runs through its own stages: its settings are the config's. Both rows share the ratings, by the question of the
# config: another would multiply the calls.
OURS: dict[str, dict[str, Any]] = {
    "megu": {},
    "megu-paper": {key: value for key, value in preset_settings("paper").items() if not key.startswith("mllm.")},
}
# What nothing is to be better than: the starting point, the goal, and the cheats.
REFERENCES = ("original", "retrain", "mask", "new_head", "bias_shift")
# Sections of which a variant may change settings: the others decide what all rows share.
_VARIED = ("mllm", "transition", "labels", "noise", "finetune")
# Names of other files and cells in the folder of a seed.
_TAKEN = {"tune", *STAGES, *(Path(stage.file).stem for stage in STAGES.values())}


@dataclass(frozen=True)
class Contender:
    """A row of a comparison: a method with settings.

    Attributes:
        label: Name of the row and of its files. A variant has its own; otherwise it is the method's name.
        method: Name of the method.
        settings: Setting -> value, where it differs from the method's defaults. MeGU's are dotted keys of the config.
    """

    label: str
    method: str
    settings: Mapping[str, Any]


def variants(config: Config) -> dict[str, Contender]:
    """Return the variants of ``compare.variants`` by name, with the settings that they change.

    Raises:
        ConfigError: A name, a method or a setting is at fault; the message names the variant and the key.
    """
    found = {}
    for name, entry in config.compare.variants.items():
        where, settings = f"compare.variants.{name}", dict(entry)
        _check_name(name)
        method = settings.pop("method", "megu")
        if method in ("original", "retrain") or method not in (*OURS, *methods()):
            raise ConfigError(
                f"{where}: there is no method {brief(method)} that has variants",
                f"Known: {', '.join(dict.fromkeys([*OURS, *methods()]))}; original and retrain have no variants.",
            )
        try:
            if method in OURS:
                _check_settings(config, {**OURS[method], **settings}, settings)
            else:
                methods()[method].settings({**config.compare.settings.get(method, {}), **settings})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}", error.hint) from None
        found[name] = Contender(name, method, settings)
    return found


def _check_name(name: str) -> None:
    """Raise ConfigError if a variant cannot have this name; it becomes the name of a file."""
    where = f"compare.variants: {brief(name)}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.=+-]{0,79}", name, re.ASCII):
        raise ConfigError(
            f"{where} is no name for a variant", "Use at most 80 letters, digits and the characters _ . = + -"
        )
    if name.lower() in (*OURS, *methods(), "original", "retrain"):
        raise ConfigError(f"{where} is the name of a method", "Give the variant another name.")
    if name.lower() in _TAKEN:
        raise ConfigError(f"{where} is the name of a file or stage of megu", "Give the variant another name.")


def _check_settings(config: Config, settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise ConfigError if the config refuses these settings, or if other rows do not have them in common."""
    changed(config, settings)
    for key in changes:
        section = key.partition(".")[0]
        if section not in _VARIED:
            raise ConfigError(
                f"{key}: all methods of a comparison share this setting",
                f"A variant may change settings of {', '.join(_VARIED)}.",
            )
        if isinstance(get(config, key), dict):
            raise ConfigError(f"{key} is a section", f"Name one setting by its dotted key, such as {key}.KEY: value.")


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
            "Fill in the file that `megu similarity --template FILE` writes and name it in mllm.ratings, or set "
            "transition.from: confusions.",
        )
    if not rated:
        known.remove("megu-paper")
    return known if names is None else list(dict.fromkeys(names))
