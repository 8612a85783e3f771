"""Is a method's figure the oracle's, up to what two oracles differ by? Two one-sided tests, and one of a difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["equivalent", "different", "undecided"]
LEVEL = 0.05


@dataclass(frozen=True)
class Equivalence:
    """What the seeds say of one figure of one method.

    Attributes:
        verdict: ``equivalent``: the 90% interval of the difference lies within the margin on both sides of 0 (two
            one-sided t-tests at 5%). Otherwise ``different`` where the paired t-test, after Holm's correction over the
            methods, finds a difference, and else ``undecided``.
        mean: Of the differences.
        margin: How far two oracles are apart in this figure, in the mean over seeds.
        p_different: Of the paired t-test, corrected by Holm.
        p_equivalent: The larger of the two one-sided tests'.
        seeds: How many there were.
    """

    verdict: Verdict
    mean: float
    margin: float
    p_different: float
    p_equivalent: float
    seeds: int


def equivalences(
    differences: Mapping[str, Mapping[str, Sequence[float]]], margins: Mapping[str, float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The verdict on every figure of every method.

    Args:
        differences: Method -> figure -> difference to the oracle of each seed.
        margins: Figure -> margin, above 0.

    Returns:
        Method -> figure -> fields of `Equivalence`; a figure without a margin, or with fewer than three seeds, is not
        there.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in differences}
    for figure, margin in margins.items():
        tested = {
            name: [float(value) for value in by_figure[figure]]
            for name, by_figure in differences.items()
            if len(by_figure.get(figure, ())) >= 3
        }
        raw = {name: _p(values, 0.0, "two-sided") for name, values in tested.items()}
        corrected = holm(raw)
        for name, values in tested.items():
            same = max(_p(values, -margin, "greater"), _p(values, margin, "less"))
            verdict: Verdict = (
                "equivalent" if same <= LEVEL else "different" if corrected[name] <= LEVEL else "undecided"
            )
            mean = sum(values) / len(values)
            found[name][figure] = asdict(Equivalence(verdict, mean, margin, corrected[name], same, len(values)))
    return found


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number. Source: Holm, 1979, Scandinavian Journal of Statistics 6(2)."""
    result, largest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - place) * p[name]))
        result[name] = largest
    return result


def _p(values: Sequence[float], mean: float, alternative: Literal["two-sided", "less", "greater"]) -> float:
    """p-value of a one-sample t-test; values without spread are certain."""
    from scipy import stats

    if max(values) == min(values):
        apart = values[0] - mean
        holds = {"two-sided": apart != 0, "less": apart < 0, "greater": apart > 0}[alternative]
        return 0.0 if holds else 1.0
    p = float(stats.ttest_1samp(values, mean, alternative=alternative).pvalue)
    return 1.0 if math.isnan(p) else p
