"""The registry of metrics: an entry is all that a metric needs, and the page of docs is current."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megu_cli.compare import nearest
from megu_cli.compare.statistics import distances
from megu_cli.evaluation.registry import Metric, find, loaded, metrics, register, registered
from megu_cli.evaluation.requirements import names

DOCS = Path(__file__).parents[2] / "docs"


def _surprise(measurement):
    train, forget = measurement.predictions.train, measurement.problem.request.forget
    return 1 + float(train.entropy[forget].median())


def _nearness(measurement, oracle):
    return float(measurement.predictions.train.entropy.mean() - oracle.predictions.train.entropy.mean()) ** 2


SURPRISE = Metric("surprise", "median entropy, forget set", _surprise, unit="number", plain="How it shrugs.")
NEARNESS = Metric("nearness", "squared difference of entropies", _nearness, "comparison", target=0.0, column="near")


def test_a_new_entry_shows_everywhere(megu, finished):
    with registered(SURPRISE), registered(NEARNESS):
        answer = megu(
            "eval", "-c", finished, "--force", "--require", "surprise<=0", "--require", "nearness>=0", "--json"
        )
        assert answer.code == 3
        unlearned = answer.json["unlearned"]["surprise"]
        assert unlearned > 0
        assert "surprise<=0 is not met" in answer.err
        assert "nearness" not in answer.err
        table = megu("eval", "-c", finished).out
        assert f"{unlearned:.3f}" in next(line for line in table.splitlines() if "median entropy, forget set" in line)
        assert "squared difference of entropies" in table
        assert megu("report", "-c", finished, "--format", "md").code == 0
        page = (finished.parent / "run" / "report.md").read_text()
        row = next(line for line in page.splitlines() if "How it shrugs." in line)
        assert f"{unlearned:.3f}" in row
        compared = megu("compare", "-c", finished, "--methods", "retrain,megu,mask", "--seeds", "1", "--json")
        assert compared.code == 0
        mask = compared.json["methods"]["mask"]
        assert mask["mean"]["nearness"] == mask["seeds"]["0"]["comparison"]["nearness"]
        assert {"surprise", "nearness"} <= set(mask["paired"])
        assert "near" in megu("compare", "-c", finished, "--methods", "retrain,megu,mask", "--seeds", "1").out
        with pytest.raises(ValueError, match="already"):
            register(SURPRISE)
    assert find("surprise") is None
    assert megu("eval", "-c", finished, "--require", "surprise<=0").code == 2


def test_a_figure_that_is_no_number_is_an_error_that_names_the_metric(megu, finished):
    with registered(Metric("depth_of_oblivion", "depth of oblivion", lambda measurement: float("nan"))):
        answer = megu("eval", "-c", finished, "--force")
    assert answer.code == 1
    assert "the metric depth_of_oblivion is nan" in answer.err


def test_every_built_in_entry_is_complete():
    for metric in metrics():
        assert metric.label, metric.name
        assert metric.definition, metric.name
        assert metric.direction, metric.name
        if metric.group != "time":
            assert callable(loaded(metric.function)), metric.name
        if "report" in metric.places:
            assert metric.title, metric.name
            assert metric.plain, metric.name


def test_the_target_of_a_figure_decides_who_is_nearest():
    oracle, figures = {"surprise": 1.0}, {"surprise": 0.25, "nearness": 0.5}
    assert not {"surprise", "nearness"} & distances(figures, oracle).keys()
    rows = {
        name: {"seeds": {"0": {"metrics": {}, "comparison": {"nearness": x}, "entanglement": {}, "seconds": 0.0,
                               "time_ratio": None}}}
        for name, x in (("far", 3.0), ("near", 1.0))
    }  # fmt: skip
    with registered(SURPRISE), registered(NEARNESS):
        assert distances(figures, oracle)["surprise"] == 0.75
        assert distances(figures, oracle)["nearness"] == 0.5
        assert nearest(rows, "nearness") == "near"
        assert {"surprise", "nearness"} <= set(names())
    assert nearest(rows, "nearness") is None


def test_the_tables_of_the_page_are_current():
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    current = runpy.run_path(str(DOCS / "metrics_tables.py"))["page"]
    assert current(page) == page
    assert all(f"`{metric.name}`" in page for metric in metrics())
    with registered(SURPRISE):
        assert current(page) != page


def test_the_registry_imports_nothing_heavy():
    script = "import sys, megu_cli.evaluation.requirements, megu_cli.cli.tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
