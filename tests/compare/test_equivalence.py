"""Equivalence and difference on differences whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megu_cli.compare.equivalence import equivalences, holm
from megu_cli.compare.statistics import against_oracle


def differences(mean: float, spread: float, seeds: int, seed: int = 0) -> list[float]:
    """Differences with exactly this mean and standard deviation."""
    values = np.random.default_rng(seed).normal(size=seeds)
    return list(mean + spread * (values - values.mean()) / values.std(ddof=1))


def verdicts(margin: float, **methods: list[float]) -> dict[str, str]:
    found = equivalences({name: {"js": values} for name, values in methods.items()}, {"js": margin})
    return {name: by_figure["js"]["verdict"] for name, by_figure in found.items()}


def test_three_verdicts():
    assert verdicts(
        0.1,
        near=differences(0.01, 0.02, 8),
        far=differences(0.5, 0.05, 8),
        noisy=differences(0.05, 0.5, 8),
    ) == {"near": "equivalent", "far": "different", "noisy": "undecided"}


def test_a_small_difference_that_is_certain_is_still_equivalent():
    found = equivalences({"a": {"js": differences(0.02, 0.005, 8)}}, {"js": 0.1})["a"]["js"]
    assert found["verdict"] == "equivalent"
    assert found["p_different"] < 0.001


def test_the_interval_is_the_90_percent_one():
    """Two one-sided tests at 5% hold exactly where the 90% interval lies within the margin."""
    for seed in range(30):
        values = differences(0.06, 0.06, 6, seed)
        mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(6)
        high = mean + stats.t.ppf(0.95, 5) * error
        for margin in (high - 1e-6, high + 1e-6):
            found = equivalences({"a": {"js": values}}, {"js": margin})["a"]["js"]
            assert (found["verdict"] == "equivalent") == (high < margin)


def test_many_methods_are_corrected_for():
    """At p = 0.038 one method alone is different; among ten like it none is."""
    values = differences(0.4, 0.4, 7)
    alone = verdicts(0.01, a=values)
    together = verdicts(0.01, **{f"m{i}": values for i in range(10)})
    assert alone == {"a": "different"}
    assert set(together.values()) == {"undecided"}


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_differences_without_spread():
    assert verdicts(0.1, same=[0.0] * 4, off=[0.3] * 4) == {"same": "equivalent", "off": "different"}


def test_two_seeds_say_nothing():
    assert equivalences({"a": {"js": [0.1, 0.2]}}, {"js": 1.0}) == {"a": {}}


def cell(js: float | None, retained: float) -> dict:
    empty = {"seconds": None, "time_ratio": None, "entanglement": {}}
    return {**empty, "metrics": {"retain_test_acc": retained}, "comparison": {"js_divergence": js}}


def test_what_is_held_against_the_oracle():
    """A figure with the oracle's own as target: the difference to it. A distance: beyond the other oracle's."""
    margins, apart = against_oracle({
        "retrain": {"0": cell(0.1, 0.90), "1": cell(0.2, 0.92), "2": cell(0.3, 0.97)},
        "megu": {"0": cell(0.15, 0.91), "1": cell(0.2, 0.90), "2": cell(None, 0.97)},
    })  # fmt: skip
    assert margins == pytest.approx({"js_divergence": 0.2, "retain_test_acc": (0.02 + 0.07 + 0.05) / 3})
    assert apart["megu"]["js_divergence"] == pytest.approx([0.05, 0.0])
    assert apart["megu"]["retain_test_acc"] == pytest.approx([0.01, -0.02, 0.0])
    assert "retrain" not in apart
