"""How results are kept: compact JSON, five significant digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megu_cli.run.writing import replacing


def write(path: Path, result: Any) -> None:
    """Write results whole, or not at all."""
    with replacing(path) as temporary:
        text = json.dumps(_rounded(result), separators=(",", ":"), allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
