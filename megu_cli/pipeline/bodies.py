"""Check the form of an artifact's body: a body may be handed over, with digests that fit it.

A form is a type or a tuple of types, ``[form of each item]``, or ``{key: form}``; the key ``str`` stands for any key.
A stage's row in `megu_cli.pipeline.stages` has the form of its body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megu_cli.pipeline.stages import Stage


def fault(stage: Stage, body: Mapping[str, Any]) -> str:
    """What is wrong with the form of a stage's body, in words; empty: nothing."""
    if missing := [key for key in stage.required if key not in body]:
        return f"{missing[0]} is missing"
    return next((f"{key} has another form" for key, form in stage.body.items() if not _fits(body, key, form)), "")


def _fits(mapping: Mapping[str, Any], key: Any, form: Any) -> bool:
    values = mapping.values() if key is str else [mapping[key]] if key in mapping else []
    return all(_has(value, form) for value in values)


def _has(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_has(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_fits(value, key, inner) for key, inner in form.items())
    return isinstance(value, form) and not isinstance(value, bool)
