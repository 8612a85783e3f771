"""Means, intervals and paired differences over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megu_cli.evaluation.registry import metrics

Row = dict[str, Any]


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean, and half-width of its 95% interval (Student's t), of every figure over seeds.

    ``None`` where a seed has no such figure; the interval needs two seeds.
    """
    mean: dict[str, float | None] = {}
    interval: dict[str, float | None] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [value for row in rows if (value := row.get(name)) is not None]
        complete = len(values) == len(rows)
        mean[name], interval[name] = _interval(values) if complete else (None, None)
    return {"mean": mean, "interval": interval}


def _interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half-width of its 95% interval by Student's t; ``None`` for a single value."""
    from scipy import stats

    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, None
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)


def distances(own: Mapping[str, float | None], oracle: Mapping[str, float | None]) -> dict[str, float]:
    """How far the main figures of a method are from their targets: the oracle's of the same seed, 0 or 1.

    Args:
        own: The method's figures.
        oracle: The oracle's; empty where it is not known.

    Returns:
        Figure -> |own - target|, of those that both have.
    """
    pairs = {
        metric.name: (own.get(metric.name), oracle.get(metric.name) if metric.target == "oracle" else metric.target)
        for metric in metrics(place="paired")
    }
    return {name: abs(x - target) for name, (x, target) in pairs.items() if x is not None and target is not None}


def paired(
    other: Mapping[str, Mapping[str, float]], ours: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float | int | None]]:
    """How much farther from the target a method is than ours, seed by seed; above 0: ours is nearer.

    Better or worse is what has an interval without 0: the paired t-test at 5%.

    Args:
        other: Seed -> `distances` of the method.
        ours: The same of ours.

    Returns:
        Figure -> ``mean`` of the differences, half-width of its 95% ``interval`` by Student's t (``None`` for a single
        seed), and the number of ``seeds`` that have both.
    """
    result: dict[str, dict[str, float | int | None]] = {}
    for name in (metric.name for metric in metrics(place="paired")):
        seeds = [seed for seed in other if name in other[seed] and name in ours.get(seed, {})]
        if seeds:
            mean, interval = _interval([other[seed][name] - ours[seed][name] for seed in seeds])
            result[name] = {"mean": mean, "interval": interval, "seeds": len(seeds)}
    return result


def against_oracle(
    cells: Mapping[str, Mapping[str, Row]],
) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """What an equivalence with the oracle is judged by.

    Args:
        cells: Method -> seed -> cell; ``retrain`` is held against the oracle of another seed.

    Returns:
        Figure -> margin: how far two oracles are apart, in the mean over seeds, where they are at all. And method ->
        figure -> difference of each seed: to the oracle's own figure or, where the target is a number, of the distance
        from it to the distance that the other oracle has.
    """
    floor = {seed: figures(cell) for seed, cell in cells.get("retrain", {}).items()}
    oracles = list(floor.values())
    margins: dict[str, float] = {}
    targets = {metric.name: metric.target for metric in metrics(place="paired") if metric.target is not None}
    for figure, target in targets.items():
        if target == "oracle":
            values = [row[figure] for row in oracles if row.get(figure) is not None]
            apart = [abs(a - b) for a, b in itertools.combinations(values, 2)]  # type: ignore[operator]
        else:
            apart = [abs(value - target) for row in oracles if (value := row.get(figure)) is not None]
        if apart and sum(apart):
            margins[figure] = sum(apart) / len(apart)
    differences: dict[str, dict[str, list[float]]] = {}
    for name, by_seed in cells.items():
        if name == "retrain":
            continue
        for seed, cell in by_seed.items():
            for figure, value in figures(cell).items():
                other = floor.get(seed, {}).get(figure)
                if figure in margins and value is not None and other is not None:
                    target = targets[figure]
                    apart_by = value - other if target == "oracle" else abs(value - target) - abs(other - target)
                    differences.setdefault(name, {}).setdefault(figure, []).append(apart_by)
    return margins, differences


def nearest(rows: Mapping[str, Row], figure: str, excluded: Iterable[str] = ()) -> str | None:
    """The method whose figure is nearest to its target, in the mean over all seeds; ``None`` if none has it.

    Args:
        rows: Name -> row of compare.json.
        figure: One of those that `distances` gives.
        excluded: Names of methods that cannot be it.
    """
    oracles = {seed: figures(cell) for seed, cell in rows.get("retrain", {}).get("seeds", {}).items()}
    complete = max((len(row["seeds"]) for row in rows.values()), default=0)
    apart = {}
    for name, row in rows.items():
        found = [distances(figures(cell), oracles.get(seed, {})).get(figure) for seed, cell in row["seeds"].items()]
        known = [distance for distance in found if distance is not None]
        if name not in {*excluded} and known and len(known) == complete:
            apart[name] = sum(known) / complete
    return min(apart, key=lambda name: apart[name]) if apart else None


def figures(cell: Row) -> dict[str, float | None]:
    """All figures of a method with one seed, as compare.json has them."""
    time = {"seconds": cell["seconds"], "time_ratio": cell["time_ratio"]}
    return {**cell["metrics"], **cell["comparison"], **cell["entanglement"], **time}
