"""Without ratings: the default for data of one's own, what refuses it, and a file to fill in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file

from megu_cli.config import load_config
from megu_cli.config.datasets import DATA_SOURCES
from megu_cli.errors import ConfigError, DataError
from megu_cli.mllm.base import Question
from megu_cli.mllm.recorded import Recorded
from megu_cli.request.resolve import class_positions

FOLDER = {"name": "imagefolder", "root": "photos", "image_size": 8}


def test_the_default_follows_the_data(tmp_path):
    ratings = Path(__file__).parents[2] / "megu_cli" / "mllm" / "ratings"
    rated = [row.name for row in DATA_SOURCES.values() if row.rated]
    assert sorted(rated) == sorted(file.stem for file in ratings.glob("*.json"))
    assert load_config(write_config(tmp_path)).mllm.backend == "recorded"
    assert load_config(write_config(tmp_path, data=FOLDER)).mllm.backend == "none"
    assert load_config(write_config(tmp_path, data={"name": "cifar10"})).mllm.backend == "none"
    assert load_config(write_config(tmp_path, data=FOLDER, mllm={"ratings": "r.json"})).mllm.backend == "recorded"
    assert load_config(write_config(tmp_path, mllm={"backend": "none"})).mllm.backend == "none"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "paper"}, "preset: paper takes labels from ratings"),
        ({"labels": {"source": "transition"}}, "labels.source: transition takes labels from ratings"),
    ],
)
def test_what_needs_ratings_refuses_none_and_says_what_to_do(tmp_path, settings, said):
    with pytest.raises(ConfigError) as failure:
        load_config(write_config(tmp_path, data=FOLDER, **settings))
    assert said in failure.value.message
    assert "megu similarity --template FILE" in failure.value.message
    load_config(write_config(tmp_path, data=FOLDER, mllm={"ratings": "r.json"}, **settings))


@pytest.mark.slow
def test_a_run_without_ratings(megu, tmp_path):
    file = write_config(tmp_path, mllm={"backend": "none"})
    answer = megu("run", "-c", file)
    assert answer.code == 0, answer.err
    assert answer.err.count("no ratings (mllm.backend: none): every class counts as near as any other") == 1
    body = json.loads((tmp_path / "run" / "similarity.json").read_text())
    assert (body["scores"], body["backend"]) == ({}, "none")
    (row,) = load_file(tmp_path / "run" / "transition.safetensors")["transition"]
    torch.testing.assert_close(row[row > 0], torch.full((9,), 1 / 9, dtype=torch.float64))
    assert megu("status", "-c", file).code == 0
    assert megu("report", "-c", file).code == 0


def test_compare_leaves_out_the_method_that_needs_ratings(megu, tmp_path):
    file = write_config(tmp_path, mllm={"backend": "none"}, compare={"seeds": 1})
    plan = megu("compare", "-c", file, "--dry-run", "--json").json["plan"]
    assert not [row for row in plan if "megu-paper" in row["stage"]]
    answer = megu("compare", "-c", file, "--methods", "megu-paper", "--dry-run")
    assert (answer.code, "megu-paper takes labels from ratings" in answer.err) == (2, True)


def test_a_template_is_filled_in_and_used(megu, tmp_path):
    file, template = write_config(tmp_path, mllm={"backend": "none"}), tmp_path / "ratings.json"
    answer = megu("similarity", "-c", file, "--template", template)
    assert answer.code == 0, answer.err
    assert "9 numbers from 0 to 10 to fill in" in answer.out
    content = json.loads(template.read_text())
    assert content["scores"] == {"8": dict.fromkeys("012345679")}
    assert not (tmp_path / "run").exists()
    rated = ("--set", f"mllm.ratings={template}", "--set", "mllm.backend=recorded")
    answer = megu("similarity", "-c", file, *rated)
    assert (answer.code, "8 / 0" in answer.err) == (2, True)  # not filled in
    answer = megu("similarity", "-c", file, "--template", template)
    assert (answer.code, "is there already" in answer.err) == (2, True)
    content["scores"]["8"] = dict.fromkeys("012345679", 3)
    template.write_text(json.dumps(content))
    assert megu("similarity", "-c", file, *rated).code == 0


def test_a_partial_row_names_five_classes_and_a_number(tmp_path):
    names = [f"class{i}" for i in range(1000)]
    file = tmp_path / "ratings.json"
    file.write_text(json.dumps({"classes": names, "rater": "x", "scores": {"class0": {"class1": 3}}}))
    with pytest.raises(DataError) as failure:
        Recorded(file).rate([Question("class0", names[1:], [])])
    assert "'class6' and 993 more" in failure.value.message
    assert len(failure.value.message) < 200
    assert len(failure.value.hint) < 1000


def test_missing_ratings_show_before_the_data_are_loaded(megu, tmp_path, monkeypatch):
    from megu_cli.pipeline.run_inputs import RunInputs

    monkeypatch.setattr(RunInputs, "data", property(lambda self: pytest.fail("the data were loaded")))
    file, ratings = write_config(tmp_path), tmp_path / "ratings.json"
    for more in ([], ["--dry-run"]):
        answer = megu("run", "-c", file, "--set", f"mllm.ratings={ratings}", *more)
        assert (answer.code, "ratings.json" in answer.err) == (2, True)
    ratings.write_text(json.dumps({"classes": ["1", "8"], "rater": "x", "scores": {"1": {"8": 3}}}))
    answer = megu("run", "-c", file, "--set", f"mllm.ratings={ratings}")
    assert (answer.code, "no row for '8'" in answer.err) == (2, True)


def test_a_name_of_another_case_is_taken_and_said():
    taken: list[str] = []
    assert class_positions(["ankle BOOT", "Bag"], ["Bag", "Ankle boot"], taken=taken) == [0, 1]
    assert taken == ["'ankle BOOT' is taken for the class 'Ankle boot'"]
    with pytest.raises(DataError, match="there is no class 'bag'"):
        class_positions(["bag"], ["Bag", "BAG"])
