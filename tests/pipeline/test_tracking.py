"""`tracking.tracker`: what a tracker is told, and that it has no say."""

from __future__ import annotations

import sys

import pytest
from conftest import weights, write_config

from megu_cli.config import load_config
from megu_cli.pipeline.tracking import settings

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def told(monkeypatch):
    """What a tracker that stands for MLflow is told, in order."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    events = []

    class Fake(tracking.GeneralTracker):
        name = "mlflow"
        requires_logging_directory = False
        broken = False

        def __init__(self, project, **settings):
            super().__init__()
            self.project = project

        @property
        def tracker(self):
            return self

        def start(self):
            sys.stdout.write("hello")
            events.append(("start", self.project))

        def store_init_configuration(self, values):
            events.append(("settings", values))

        def log(self, values, step=None, **more):
            if Fake.broken:
                raise OSError("no space\nleft")
            events.append(("log", step, values))

        def finish(self):
            events.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.MLFLOW])
    yield events, Fake
    accelerate.state.PartialState._reset_state()


ON = ("--set", "tracking.tracker=mlflow", "--set", "tracking.project=mine")


def test_figures_and_settings_are_reported_and_nothing_becomes_stale(megu, finished, told):
    events, _ = told
    before = weights(finished.parent / "run")
    answer = megu("train", "-c", finished, "--force", *ON)
    assert answer.code == 0, answer.err
    assert events[0] == ("start", "mine")
    assert events[-1] == ("finish",)
    rows = [row for kind, *row in events if kind == "log"]
    losses = [(values["train/epoch"], values["train/loss"]) for _, values in rows if "train/loss" in values]
    assert [epoch for epoch, _ in losses] == [1, 2]
    assert losses[1][1] < losses[0][1]
    assert [step for step, _ in rows] == [0, 1, 2]
    assert rows[-1][1].keys() == {"train/seconds"}
    given = events[1][1]
    assert (given["model.name"], given["data.name"], given["train.epochs"]) == ("small_cnn", "digits", 2)
    assert not any(str(finished.parent) in str(value) for value in given.values())
    assert "8" not in given.values()  # the class

    assert weights(finished.parent / "run") == before
    events.clear()
    assert megu("run", "-c", finished, *ON).code == 0
    assert events == []  # nothing was computed: no run of the tracker is begun


def test_an_evaluation_is_reported_with_its_verdict_as_a_number(megu, finished, told):
    answer = megu("eval", "-c", finished, "--force", "--json", *ON)
    events, result = told[0], answer.json
    (values,) = (row[2] for row in events if row[0] == "log")
    assert values["eval/unlearned/forget_test_acc"] == result["unlearned"]["forget_test_acc"]
    comparison = result["comparison"]["unlearned"]["js_divergence"]
    assert values["eval/comparison/unlearned/js_divergence"] == comparison
    words = {"forgotten": 1, "undecided": 0, "not forgotten": -1}
    assert values["eval/verdict"] == words[result["verdict"]["verdict"]]
    assert {type(value) for value in values.values()} <= {int, float}
    assert not any("per_class" in name for name in values)


def test_a_tracker_that_fails_costs_a_warning(megu, finished, told):
    _, fake = told
    fake.broken = True
    answer = megu("train", "-c", finished, "--force", *ON)
    assert answer.code == 0
    assert answer.err.count("warning: ") == 1
    assert "tracking.tracker: mlflow failed and is left out (OSError: no space)" in answer.err


def test_what_is_missing_is_said_before_anything_runs(megu, config, told, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    answer = megu("run", "-c", config, *ON)
    assert answer.code == 2
    assert "tracking.tracker: mlflow is not installed" in answer.err
    assert "pip install mlflow" in answer.err
    assert not (config.parent / "run").exists()
    monkeypatch.delitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow")
    assert "pip install --upgrade accelerate" in megu("run", "-c", config, *ON).err


def test_neither_paths_nor_names_are_settings_that_are_reported(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "nets").mkdir()
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None},
        model={"name": "python:./nets:make", "checkpoint": "secret.pth", "classes": ["Ada", "Bob"]},
        forget={"subjects": ["Ada"]},
        mllm={"backend": "endpoint", "base_url": "http://secret:1/v1", "model": "secret", "key_env": "SECRET_KEY"},
        eval={"oracle": "secret_oracle.pth"},
    )
    found = settings(load_config(file))
    assert found["model.name"] == "python:"
    assert found["data.image_size"] == 8
    assert found["mllm.backend"] == "endpoint"
    told = str(found)
    for name in (str(tmp_path), "secret", "SECRET", "Ada", "nets", "photos"):
        assert name not in told
