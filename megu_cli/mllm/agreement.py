"""How far two sets of ratings agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_Scores = Mapping[str, Mapping[str, float]]


def compare(here: _Scores, there: _Scores, shown: int = 3) -> dict[str, Any]:
    """Spearman's rank correlation, row by row and over all ratings that both sets have.

    Args:
        here: concept -> candidate -> rating.
        there: The same, of another rater.
        shown: How many of the largest differences to give for each row.

    Returns:
        ``spearman`` and the number of ``ratings`` overall, and ``rows``, the least correlated first. A correlation is
        ``None`` where it is not defined: fewer than two shared ratings, or all of one side equal.
    """
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[float, float]] = []
    for concept, row in here.items():
        other = there.get(concept, {})
        shared = [(name, rating, other[name]) for name, rating in row.items() if name in other]
        pairs += [(a, b) for _, a, b in shared]
        apart = sorted(shared, key=lambda entry: -abs(entry[1] - entry[2]))
        rows.append(
            {
                "concept": concept,
                "spearman": _spearman([(a, b) for _, a, b in shared]),
                "ratings": len(shared),
                "differences": [{"candidate": n, "here": a, "there": b} for n, a, b in apart[:shown] if a != b],
            }
        )
    rows.sort(key=lambda row: 2.0 if row["spearman"] is None else row["spearman"])
    return {"spearman": _spearman(pairs), "ratings": len(pairs), "rows": rows}


def _spearman(pairs: list[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
        return None
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)
