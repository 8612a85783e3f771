"""The registry of metrics: one entry per metric, read by every place that computes, shows or judges one.

`megu eval` and `megu compare` compute the entries. The terminal tables, the report, ``--require``, the paired
differences of compare.json and the tables of docs/metrics.md follow from them. The registry imports no torch: an entry
names its function as text, and the function is loaded when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megu_cli.evaluation.catalogue import BUILT_IN
from megu_cli.evaluation.metric import Group, Metric, NotApplicable, Place

__all__ = ["Group", "Metric", "NotApplicable", "Place", "find", "loaded", "metrics", "register", "registered"]

_METRICS: dict[str, Metric] = {metric.name: metric for metric in BUILT_IN}


def loaded(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function of an entry, imported if it is named as text."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"megu_cli.evaluation.{module}"), name)  # type: ignore[no-any-return]


def metrics(group: Group | None = None, place: Place | None = None) -> list[Metric]:
    """All metrics in order, or those of one group, or those that show in one place."""
    return [m for m in _METRICS.values() if group in (None, m.group) and (place is None or place in m.places)]


def find(name: str) -> Metric | None:
    """The metric with this name; ``None`` if there is none."""
    return _METRICS.get(name)


def register(metric: Metric) -> None:
    """Add a metric, after those of its group.

    Raises:
        ValueError: There is a metric with this name.
    """
    if metric.name in _METRICS:
        raise ValueError(f"there is a metric {metric.name} already")
    _METRICS[metric.name] = metric


@contextmanager
def registered(metric: Metric) -> Iterator[None]:
    """Add a metric for the length of a ``with`` block."""
    register(metric)
    try:
        yield
    finally:
        del _METRICS[metric.name]
