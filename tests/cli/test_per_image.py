"""`--per-image`: what each model says of each forgotten image."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from conftest import refused, write_config, write_folder
from safetensors.torch import load_file

from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_for_each_forgotten_image_with_the_answers_of_each_model(megu, finished, tmp_path):
    file = tmp_path / "answers.csv"
    answer = megu("eval", "-c", finished, "--json", "--per-image", file)
    assert answer.code == 0, answer.err
    assert "eval: fresh" in answer.err
    assert f"wrote {file}" in answer.err
    rows, figures = rows_of(file), answer.json
    assert len(rows) == figures["request"]["forget"]
    assert {row["class"] for row in rows} == {"8"}
    for column, model in (("original", "original"), ("unlearned", "unlearned"), ("retrained", "oracle")):
        right = [row[f"{column}_right"] == "yes" for row in rows]
        assert right == [row[f"{column}_class"] == row["class"] for row in rows]
        assert sum(right) / len(rows) == pytest.approx(figures[model]["forget_train_acc"])
    # The same by hand: the model's own softmax of the true class.
    work = RunContext.open(load_config(finished))
    data, index = work.inputs.data, work.inputs.request.forget
    model = work.load(load_file(finished.parent / "run" / "model.safetensors"), "model")
    with torch.no_grad():
        expected = model(next(iter(data.train.batches([index], torch.device("cpu"))))).softmax(1)[:, 8]
    assert [float(row["unlearned_probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [row["image"] for row in rows] == [data.train.names[i] for i in index.tolist()]

    before = file.read_bytes()
    assert megu("run", "-c", finished, "-q", "--per-image", file).code == 0
    assert file.read_bytes() == before


def test_copies_are_marked_and_without_an_oracle_there_is_no_column_of_it(megu, tmp_path):
    images = tmp_path / "photos"
    write_folder(images, number=12)
    shutil.copy(images / "train" / "cat" / "0.png", images / "train" / "cat" / "again.png")
    (tmp_path / "delete.csv").write_text("cat/0.png\ndog/1.png\n")
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "photos", "image_size": 16, "limit": None},
        forget={"samples": "delete.csv"},
        labels={"proxy": {"images": 20, "passes": 1, "networks": 1}},
    )
    answer = megu("run", "-c", file, "-q", "--per-image", tmp_path / "answers.csv")
    assert answer.code == 0, answer.err
    rows = rows_of(tmp_path / "answers.csv")
    assert [(row["image"], row["class"], row["copy"]) for row in rows] == [
        ("train/cat/0.png", "cat", "no"),
        ("train/cat/again.png", "cat", "yes"),
        ("train/dog/1.png", "dog", "no"),
    ]
    assert {name.split("_")[0] for name in rows[0]} == {"image", "class", "copy", "original", "unlearned"}


def test_where_the_file_may_not_be_written(megu, finished, tmp_path):
    notes = tmp_path / "notes.csv"
    notes.write_text("mine\n")
    refused(megu("eval", "-c", finished, "--per-image", notes), "notes.csv is there already")
    assert notes.read_text() == "mine\n"
    inside = finished.parent / "run" / "answers.csv"
    refused(megu("run", "-c", finished, "--per-image", inside), "lies in the run directory", "Give a path elsewhere")
    assert not inside.exists()
    for command in ("run", "eval"):
        refused(megu(command, "-c", finished, "--dry-run", "--per-image", notes), "notes.csv is there already")
    assert megu("eval", "-c", finished, "--dry-run", "--per-image", tmp_path / "no.csv").code == 0
    assert not (tmp_path / "no.csv").exists()
