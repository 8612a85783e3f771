"""The configs that `megu init` and `megu demo` write, made from the declared settings."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megu_cli.config import Config
from megu_cli.config.json_schema import MODELINE, SCHEMA_FILE
from megu_cli.errors import ConfigError

_WIDTH = 40
_TEXT = 76

_MODELINE = f"{MODELINE}{SCHEMA_FILE}"

DEMO = (
    f"{_MODELINE}\n"
    + """\
# The demo: scikit-learn's digits, forget the class 8. `megu init` writes a config with every setting explained.
out: .
data: {name: digits}
model: {name: small_cnn}
forget: {classes: ["8"]}
train: {epochs: 30, batch: 32, lr: 0.02}
finetune: {epochs: 1, lr: 0.005, retain_fraction: 4, batch: 64, forget_batch: 32}
eval: {oracle: true}
"""
)


def data_at(images: Path, folder: Path) -> dict[str, Any]:
    """The settings of ``data`` for images of one's own.

    Args:
        images: A folder of images, a CSV manifest, or a saved Hugging Face data set.
        folder: Where the config will lie: paths in it are relative to it.

    Raises:
        ConfigError: There is nothing of the kind.
    """
    place = beside(images, folder)
    if images.is_file() and images.suffix == ".csv":
        return {"name": "manifest", "manifest": place}
    if not images.is_dir():
        raise ConfigError(
            f"--images: {images} is neither a folder nor a CSV",
            "Name a folder of images, a manifest (.csv), or the folder of a saved Hugging Face data set.",
        )
    saved = any((images / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return {"name": "hf_dataset" if saved else "imagefolder", "root": place}


def beside(path: Path, folder: Path) -> str:
    """A path as a config in ``folder`` names it."""
    return str(path) if path.is_absolute() else os.path.relpath(path, folder)


def template(
    data: dict[str, Any],
    model: str,
    checkpoint: str | None,
    classes: list[str] | None,
    samples: str | None,
    subjects: list[str] | None,
    fraction: float | None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """A commented megu.yaml: what was chosen is set, every other setting stands as a comment with its default.

    Args:
        data: The section.
        model: Its name.
        checkpoint: Its trained weights.
        classes: To forget.
        samples: A deletion list.
        subjects: To forget.
        fraction: To forget, drawn.
        more: Dotted key -> value of other settings that are chosen.
    """
    if samples is not None:
        forget: dict[str, Any] = {"samples": samples}
    elif subjects is not None:
        forget = {"subjects": subjects}
    elif fraction is not None:
        forget = {"random": {"fraction": fraction}}
    else:
        forget = {"classes": classes or ["CHANGE ME"]}
    chosen: dict[str, dict[str, Any]] = {
        "data": data,
        "model": {"name": model, **({"checkpoint": checkpoint} if checkpoint else {})},
        "forget": forget,
    }
    top: dict[str, Any] = {}
    for key, value in (more or {}).items():
        name, _, setting = key.partition(".")
        if setting:
            chosen.setdefault(name, {})[setting] = value
        else:
            top[name] = value
    lines = [_MODELINE, "# megu: what is set here is chosen; what is commented out shows the default.", ""]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            lines.append(_line("", name, top.get(name, field.default), field.description or "", set_=name in top))
            continue
        settings = chosen.get(name, {})
        lines += ["", f"{'' if settings else '# '}{name}:  # {(section.__doc__ or '').strip()}"]
        lines += _section("  ", section, settings)
    return "\n".join(lines) + "\n"


def _section(indent: str, section: type[BaseModel], settings: dict[str, Any]) -> list[str]:
    """The lines of a section's settings; a section within it is indented further."""
    lines = []
    for key, setting in section.model_fields.items():
        inner = setting.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += [f"# {indent}{key}:  # {(inner.__doc__ or '').strip()}", *_section(f"{indent}  ", inner, {})]
            continue
        value = settings.get(key, setting.get_default(call_default_factory=True))
        lines.append(_line(indent, key, value, setting.description or "", set_=key in settings))
    return lines


def _line(indent: str, key: str, value: Any, description: str, set_: bool) -> str:
    plain = str(value) if isinstance(value, Path) else value
    shown = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    if isinstance(plain, str):
        shown = json.dumps(plain) if shown.startswith("'") else shown
    first, *more = textwrap.wrap(description, _TEXT) or [""]
    setting = f"{'' if set_ else '# '}{indent}{key}: {shown}"
    return "\n".join([f"{setting:{_WIDTH}}  # {first}", *(f"{'':{_WIDTH}}  # {line}" for line in more)])
