"""A second request on a model that was unlearned before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import refused, write_config
from safetensors.torch import save_file
from transformers import ViTConfig

from megu_cli.config import changed, load_config
from megu_cli.pipeline.context import RunContext
from megu_cli.run import artifacts

# Long enough for digits to be learned, and for a class to be forgotten.
LEARNED = {
    "data": {"limit": 800},
    "train": {"epochs": 10, "batch": 32, "lr": 0.02},
    "finetune": {"epochs": 2, "retain_fraction": 4, "batch": 64, "forget_batch": 32},
}


def second(folder: Path, first: Path, **forget: object) -> Path:
    """A config that goes on from an unlearned checkpoint."""
    checkpoint = {"name": "small_cnn", "checkpoint": str(first / "model.safetensors")}
    return write_config(folder, model=checkpoint, forget=forget, **LEARNED)


@pytest.mark.slow
def test_forget_more_and_what_was_forgotten_stays_so(megu, tmp_path):
    one = write_config(tmp_path / "one", **LEARNED)
    assert megu("run", "-c", one, "-q").code == 0
    assert megu("purge", "-c", one, "--yes", "-q").code == 0
    first = tmp_path / "one" / "run"

    two = second(tmp_path / "two", first, classes=["3"], already=[str(first)])
    answer = megu("run", "-c", two, "--set", "eval.oracle=true", "--json", "-q")
    assert answer.code == 0, answer.err
    figures = answer.json
    assert figures["original"]["forget_train_acc"] > 0.9
    assert figures["unlearned"]["forget_train_acc"] <= 0.05
    assert figures["original"]["already_train_acc"] <= 0.05
    assert figures["unlearned"]["already_train_acc"] <= 0.05
    assert figures["oracle"]["already_train_acc"] == 0
    assert figures["unlearned"]["retain_test_acc"] > 0.9
    out = tmp_path / "two" / "run"
    assert artifacts.read_body(out / "finetune.json")["forgotten"] == {"concepts": ["3", "8"], "images": []}
    matrix = artifacts.read(out / "transition.safetensors").tensors["transition"]
    assert matrix[:, 8].tolist() == [0]
    assert "8" not in artifacts.read_body(out / "labels.safetensors")["counts"]

    three = second(tmp_path / "three", out, classes=["1"], already=[str(out)])
    figures = megu("run", "-c", three, "--json", "-q").json
    assert figures["request"]["classes"] == ["1", "3", "8"]
    assert figures["unlearned"]["already_train_acc"] <= 0.05
    assert figures["unlearned"]["forget_train_acc"] <= 0.05


def test_an_unlearned_checkpoint_says_so(megu, finished, tmp_path):
    first = finished.parent / "run"
    folder = tmp_path / "next"
    file = second(folder, first, classes=["3"])
    answer = megu("run", "-c", file, "--dry-run", "--json")
    assert "the checkpoint was unlearned before; these stay forgotten: class 8" in answer.json["notes"]
    assert RunContext.open(load_config(file)).inputs.request.classes == [3, 8]
    assert RunContext.open(load_config(file, ["forget.already=[]"])).inputs.request.classes == [3]
    # Where it does not say what it has forgotten, the user must, in whichever form it was written.
    torch.save({}, first / "model.pth")
    refused(
        megu("run", "-c", file, "--set", f"model.checkpoint={first / 'model.pth'}"),
        "was unlearned before, and does not say",
        f"Set forget.already to [{first}]",
    )
    ViTConfig(num_labels=10).save_pretrained(first / "model")
    save_file({}, first / "model" / "model.safetensors")
    named = f"model.name=hf:{first / 'model'}"
    refused(megu("run", "-c", file, "--set", named, "--set", "model.checkpoint=null"), "model was unlearned before")
    # An original that a run directory holds was not.
    original = f"model.checkpoint={first / 'original.safetensors'}"
    assert RunContext.open(load_config(file, [original])).inputs.request.classes == [3]
    # A request given by flag does not undo what the file says of earlier ones.
    file = second(folder, first, classes=["3"], already=[str(first)])
    answer = megu("run", "-c", file, "--dry-run", "--json", "--set", "forget.classes=[7]")
    assert {row["action"] for row in answer.json["plan"]} == {"run"}
    refused(megu("run", "-c", file, "--set", "forget.classes=['8']"), "nothing that forget.already does not name")


def test_earlier_requests_as_lists_and_configs(megu, finished, tmp_path):
    folder = tmp_path / "next"
    first = finished.parent / "run"
    file = second(folder, first, classes=["3"], already=["nowhere"])
    refused(megu("run", "-c", file), "finetune.json is not there")
    file = second(folder, first, classes=["3"], already=["earlier.csv", str(finished)])
    data = RunContext.open(load_config(finished)).inputs.data
    listed = [next(i for i, label in enumerate(data.train.labels) if label == wanted) for wanted in (5, 6)]
    file.parent.joinpath("earlier.csv").write_text("".join(f"{data.train.names[i]}\n" for i in listed))
    work = RunContext.open(changed(load_config(file), {"data.limit": 400}))
    request = work.inputs.request
    assert request.classes == [3, 8]
    eights = torch.where(work.inputs.data.train.labels == 8)[0].tolist()
    assert request.already.tolist() == sorted([*listed, *eights])
