"""`megu diff`: what differs between two runs."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def changed(megu, finished):
    """Another run of the same config, with one setting changed and another class forgotten."""
    other = finished.parent / "other"
    shutil.copytree(finished.parent / "run", other)
    answer = megu(
        "run", "-c", finished, "-o", other, "--set", "finetune.lr=0.01", "--set", "forget.classes=['3']", "-q"
    )
    assert answer.code == 0, answer.err
    return finished.parent / "run", other


def test_settings_inputs_and_figures_that_differ(megu, changed):
    first, second = changed
    result = megu("diff", first, second, "--json").json
    assert result["same"] is False
    assert result["settings"] == [{"name": "finetune.lr", "a": "auto", "b": 0.01}]
    inputs = {row["name"] for row in result["inputs"]}
    assert inputs == {"forget", "concepts"}
    assert {"name": "classes", "a": ["8"], "b": ["3"]} in result["request"]
    evaluations = [json.loads((run / "eval.json").read_text()) for run in changed]
    figures = {row["name"]: (row["a"], row["b"]) for row in result["figures"]}
    name = "zrf"
    assert figures[f"unlearned.{name}"] == tuple(e["unlearned"][name] for e in evaluations)
    assert not any(key.startswith(("time.", "aggregates.", "meta.")) for key in figures)
    table = megu("diff", first, second).out
    for word in ("finetune.lr", "auto", "0.01", "the forget request", f"unlearned.{name}"):
        assert word in table


def test_equal_runs(megu, finished):
    run = finished.parent / "run"
    assert megu("diff", run, run).out == "no setting, input or figure differs\n"
    # Without an evaluation there are no figures to set beside each other, but settings and inputs.
    other = finished.parent / "other"
    shutil.copytree(run, other)
    (other / "eval.json").unlink()
    found = megu("diff", run, other, "--json").json
    assert found["figures"]
    assert all(row["b"] is None for row in found["figures"])
    assert not [row for row in found["settings"] if not row["name"].startswith("eval.")]


def test_what_is_no_run_is_refused(megu, finished, tmp_path):
    run = finished.parent / "run"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "mine.json").write_text("{}")
    answer = megu("diff", run, tmp_path / "empty")
    assert answer.code == 2
    assert "holds no artifact of megu" in answer.err
    text = (run / "eval.json").read_text()
    (run / "eval.json").write_text(text.replace('"forget_train_acc": ', '"forget_train_acc": 1', 1))
    answer = megu("diff", run, run)
    assert answer.code == 2
    assert "does not match its digest" in answer.err
