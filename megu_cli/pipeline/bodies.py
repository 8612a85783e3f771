"""The form of an artifact's body, stage by stage: a body may be handed over, with digests that fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NUMBER = (int, float)
# A form is a type or a tuple of types, [form of each item], or {key: form}; the key `str` stands for any key.
_TRAINING = {"classes": [str], "loss": [_NUMBER], "validation_acc": [_NUMBER], "samples": int}
_FIGURES = {str: dict}
FORMS: dict[str, dict[Any, Any]] = {
    "train": _TRAINING,
    "oracle": _TRAINING,
    "similarity": {"classes": [str], "rater": str, "scores": {str: {str: _NUMBER}}, "backend": str},
    "transition": {"rows": [str], "columns": [str]},
    "labels": {"mode": str, "classes": [str], "counts": {str: int}, "keep": {str: _NUMBER}, "proxy": {str: _NUMBER}},
    "noise": {"use": str, "classes": [str]},
    "finetune": {
        "loss": [_NUMBER],
        "validation_acc": [_NUMBER],
        "steps": int,
        "forgotten": {"concepts": [str], "images": [str]},
    },
    "eval": {
        **dict.fromkeys(("original", "mask", "unlearned", "oracle", "request", "time", "aggregates", "verdict"), dict),
        **dict.fromkeys(("comparison", "per_class", "entanglement", "intervals"), _FIGURES),
        "warnings": [str],
    },
}
# Keys that the next stage cannot do without.
_NEEDED = {"similarity": ("scores",), "labels": ("mode",)}


def fault(stage: str, body: Mapping[str, Any]) -> str:
    """What is wrong with the form of a stage's body, in words; empty: nothing."""
    if missing := [key for key in _NEEDED.get(stage, ()) if key not in body]:
        return f"{missing[0]} is missing"
    return next((f"{key} has another form" for key, form in FORMS[stage].items() if not _fits(body, key, form)), "")


def _fits(mapping: Mapping[str, Any], key: Any, form: Any) -> bool:
    values = mapping.values() if key is str else [mapping[key]] if key in mapping else []
    return all(_has(value, form) for value in values)


def _has(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_has(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_fits(value, key, inner) for key, inner in form.items())
    return isinstance(value, form) and not isinstance(value, bool)
