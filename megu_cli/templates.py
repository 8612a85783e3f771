"""The configs that `megu init` and `megu demo` write, made from the declarations in config.py."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megu_cli.config import Config

_WIDTH = 40
_TEXT = 76

DEMO = """\
# The demo: scikit-learn's digits, forget the class 8. `megu init` writes a config with every setting explained.
out: .
data: {name: digits}
model: {name: small_cnn}
forget: {classes: ["8"]}
train: {epochs: 30, batch: 32, lr: 0.02}
finetune: {retain_fraction: 4, batch: 64, forget_batch: 32}
eval: {oracle: true}
"""


def template(
    data: str,
    model: str,
    checkpoint: Path | None,
    classes: list[str] | None,
    samples: Path | None,
    fraction: float | None,
) -> str:
    """A commented megu.yaml: what was chosen is set, every other setting stands as a comment with its default."""
    if samples is not None:
        forget: dict[str, Any] = {"samples": str(samples)}
    elif fraction is not None:
        forget = {"random": {"fraction": fraction}}
    else:
        forget = {"classes": classes or ["CHANGE ME"]}
    chosen: dict[str, dict[str, Any]] = {
        "data": {"name": data, **({"root": "images", "image_size": 224} if data == "imagefolder" else {})},
        "model": {"name": model, **({"checkpoint": str(checkpoint)} if checkpoint else {})},
        "forget": forget,
    }
    lines = ["# megu: what is set here is chosen; what is commented out shows the default.", ""]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            lines.append(_line("", name, field.default, field.description or "", set_=False))
            continue
        settings = chosen.get(name, {})
        lines += ["", f"{'' if settings else '# '}{name}:  # {(section.__doc__ or '').strip()}"]
        for key, setting in section.model_fields.items():
            value = settings.get(key, setting.get_default(call_default_factory=True))
            lines.append(_line("  ", key, value, setting.description or "", set_=key in settings))
    return "\n".join(lines) + "\n"


def _line(indent: str, key: str, value: Any, description: str, set_: bool) -> str:
    plain = str(value) if isinstance(value, Path) else value
    shown = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    if isinstance(plain, str):
        shown = json.dumps(plain) if shown.startswith("'") else shown
    first, *more = textwrap.wrap(description, _TEXT) or [""]
    setting = f"{'' if set_ else '# '}{indent}{key}: {shown}"
    return "\n".join([f"{setting:{_WIDTH}}  # {first}", *(f"{'':{_WIDTH}}  # {line}" for line in more)])
