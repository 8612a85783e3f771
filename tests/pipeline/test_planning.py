"""What a run will take, told before it begins."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import listing, write_config

from megu_cli.cli import tables
from megu_cli.config import load_config
from megu_cli.pipeline import estimates as planning
from megu_cli.pipeline import rehearsal
from megu_cli.pipeline.context import RunContext


def test_a_dry_run_tells_steps_times_and_sizes_and_writes_nothing(megu, tmp_path):
    file = write_config(tmp_path, finetune={"epochs": 3, "retain_fraction": 1.0, "batch": 64}, noise={"use": "both"})
    before = listing(tmp_path)
    answer = megu("run", "-c", file, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert listing(tmp_path) == before
    result = answer.json
    rows = {row["stage"]: row for row in result["plan"]}
    work = RunContext.open(load_config(file))
    retained = len(work.inputs.request.retain)
    assert rows["train"]["steps"] == 2 * math.ceil(int(work.inputs.data.trainable.sum()) / 32)
    assert rows["finetune"]["steps"] == 3 * math.ceil(retained / 64)
    assert rows["noise"]["steps"] == 2 * 4
    assert result["retraining"]["steps"] == 2 * math.ceil(retained / 32)
    assert all(rows[name]["seconds"] > 0 for name in ("train", "labels", "noise", "finetune", "eval"))
    assert all(rows[name]["memory_bytes"] > 50e6 for name in ("train", "finetune", "eval"))
    own = sum(rows[name]["seconds"] for name in ("labels", "noise", "finetune"))
    assert result["time_ratio"] == pytest.approx(own / result["retraining"]["seconds"])
    assert result["total"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows.values()))


def test_what_labels_take_counts_the_steps_of_the_proxy(tmp_path):
    def labels(source: str) -> rehearsal.Estimate:
        file = write_config(tmp_path, labels={"source": source, "proxy": {"networks": 2, "passes": 3}})
        return planning.estimates(RunContext.open(load_config(file)))["labels"]

    plain, asked = labels("transition+prediction"), labels("auto")
    retained = len(RunContext.open(load_config(tmp_path / "megu.yaml")).inputs.request.retain)
    assert plain.steps == 0
    assert asked.steps == 2 * 3 * math.ceil(retained / (retained // 8))
    assert asked.seconds > plain.seconds
    assert asked.disk_bytes > plain.disk_bytes  # distributions instead of labels


def test_what_is_tried_is_drawn_from_all_classes():
    assert len(set((rehearsal.few(torch.arange(1000), 50) // 100).tolist())) > 5
    assert rehearsal.few(torch.arange(20), 50).tolist() == list(range(20))


def test_a_budget_and_what_is_fresh_make_the_plan_shorter(megu, finished):
    rows = megu("finetune", "-c", finished, "--max-steps", "2", "--dry-run", "--json").json["plan"]
    assert [(row["stage"], row["action"], row["steps"]) for row in rows] == [("finetune", "run", 2)]
    kept = megu("run", "-c", finished, "--dry-run", "--json").json
    assert {row["action"] for row in kept["plan"]} == {"keep"}
    assert kept["total"]["seconds"] == 0
    shown = megu("run", "-c", finished, "--dry-run")
    assert "Everything is fresh: nothing would run." in shown.out
    assert "timing" not in shown.err


def test_with_everything_fresh_nothing_is_timed(megu, finished, monkeypatch):
    monkeypatch.setattr(planning, "estimates", lambda work: pytest.fail("something was timed"))
    assert megu("run", "-c", finished, "--dry-run").code == 0
    assert megu("labels", "-c", finished, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "forget.classes=[nope]"], "there is no class 'nope'"),
        (["--set", "mllm.ratings=nowhere.json"], "nowhere.json"),
        (["--set", "model.checkpoint=nowhere.pth"], "no checkpoint at"),
        (["--set", "data.name=imagefolder", "--set", "data.root=nowhere", "--set", "data.image_size=8"], "nowhere"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_in_the_same_words(megu, tmp_path, arguments, said):
    file = write_config(tmp_path)
    dry, wet = (megu("run", "-c", file, *arguments, *more) for more in (["--dry-run"], []))
    assert (dry.code, dry.out) == (2, "")
    assert said in dry.err
    assert dry.err.startswith("reading the data, the request and the checkpoint\nerror: ")
    assert wet.err.endswith(dry.err.split("\n", 1)[1])
    assert megu("labels", "-c", file, *arguments, "--dry-run").code == 2


def test_a_dry_run_says_from_the_start_what_it_does(megu, tmp_path):
    answer = megu("run", "-c", write_config(tmp_path), "--dry-run")
    assert answer.err.splitlines()[:2] == [
        "reading the data, the request and the checkpoint",
        "timing a few batches of each stage; nothing is made",
    ]


@pytest.mark.parametrize(("ratio", "said", "dear"), [(2.7, True, True), (0.7, True, False), (0.1, False, False)])
def test_what_makes_a_long_finetuning_shorter_is_said_and_that_retraining_may_be_cheaper(capsys, ratio, said, dear):
    nothing = {"steps": 0, "calls": 0, "seconds": 0.0, "memory_bytes": None, "disk_bytes": 0, "untimed": []}
    tables.plan({"plan": [], "total": nothing, "retraining": nothing, "time_ratio": ratio})
    out = capsys.readouterr().out
    assert ("finetune.retain_fraction" in out) == said
    assert ("Retraining takes less time, and is exact" in out) == dear


def test_sizes_on_disk_are_those_of_the_files(finished):
    work = RunContext.open(load_config(finished))
    made = planning.estimates(work)
    out = finished.parent / "run"
    # A safetensors file has a header as well, with the artifact's own description.
    for stage, name, room in (("train", "original", 6e3), ("finetune", "model", 6e3), ("noise", "noise", 6e3)):
        assert 0 <= (out / f"{name}.safetensors").stat().st_size - made[stage].disk_bytes < room


def test_calls_are_counted_and_none_is_made(megu, tmp_path):
    settings = {"backend": "endpoint", "model": "m", "base_url": "http://127.0.0.1:9/v1", "images_per_class": 3}
    file = write_config(tmp_path, mllm=settings)
    answer = megu("run", "-c", file, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    row = next(row for row in answer.json["plan"] if row["stage"] == "similarity")
    assert row["calls"] == 3
    assert row["seconds"] is None
    assert answer.json["total"]["untimed"] == ["similarity"]
    assert listing(tmp_path) == {"megu.yaml"}


def test_without_data_the_plan_says_what_is_missing(megu, tmp_path):
    file = write_config(tmp_path, data={"name": "imagefolder", "root": "nowhere", "image_size": 8})
    answer = megu("run", "-c", file, "--dry-run")
    assert (answer.code, answer.out) == (2, "")
    assert "nowhere" in answer.err


@pytest.mark.slow
def test_estimates_are_within_a_factor_of_three(megu, tmp_path):
    file = write_config(
        tmp_path,
        data={"limit": None},
        train={"epochs": 10, "batch": 64},
        noise={"steps": 60},
        finetune={"epochs": 2, "retain_fraction": 4.0},
        eval={"oracle": True},
    )
    told = megu("run", "-c", file, "--dry-run", "--json").json
    assert megu("run", "-c", file).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "runs.jsonl").read_text().splitlines()]
    took = {line["stage"]: line["seconds"] for line in lines}
    estimated = {row["stage"]: row["seconds"] for row in told["plan"]}
    for stage in ("train", "oracle", "noise", "finetune"):
        assert 1 / 3 < estimated[stage] / took[stage] < 3, (stage, estimated[stage], took[stage])
    assert 1 / 3 < told["total"]["seconds"] / sum(took.values()) < 3
