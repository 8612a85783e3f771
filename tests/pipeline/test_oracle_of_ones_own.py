"""`eval.oracle: FILE`: one's own retrained model is the yardstick; and what is said of a poor one."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import refused, write_config
from safetensors.torch import load_file

from megu_cli.config import load_config
from megu_cli.evaluation.warnings import warnings
from megu_cli.pipeline.context import RunContext
from megu_cli.run import artifacts

VIT = transformers.ViTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    patch_size=4,
    num_channels=1,
    image_size=8,
    num_labels=10,
)


@pytest.fixture
def own(finished):
    """The oracle of a finished run as a .pth elsewhere; megu's own is gone."""
    run, file = finished.parent / "run", finished.parent / "mine" / "retrained.pth"
    file.parent.mkdir()
    torch.save({"state_dict": dict(load_file(run / "oracle.safetensors"))}, file)
    return file


def test_ones_own_retrained_model_gives_the_same_figures_as_the_same_weights_of_megu(megu, finished, own):
    run = finished.parent / "run"
    before = artifacts.read_body(run / "eval.json")
    (run / "oracle.safetensors").unlink()
    bytes_before = own.read_bytes()
    answer = megu("run", "-c", finished, "--set", f"eval.oracle={own}")
    assert answer.code == 0, answer.err
    assert [line for line in answer.err.splitlines() if ": running" in line] == [
        "eval: running (stale: changed: your own retrained model)"
    ]
    body, meta = artifacts.read_body(run / "eval.json"), artifacts.read_meta(run / "eval.json")
    assert not (run / "oracle.safetensors").exists()
    assert own.read_bytes() == bytes_before
    assert "retrained" in meta["inputs"]
    assert "oracle" not in meta["inputs"]
    for part in ("original", "unlearned", "oracle", "comparison", "verdict"):
        assert body[part] == before[part]
    again = megu("run", "-c", finished, "--set", f"eval.oracle={own}")
    assert ": running" not in again.err
    report = megu("report", "-c", finished, "--set", f"eval.oracle={own}", "--format", "md")
    assert report.code == 0, report.err
    assert "The retrained model was given" in (run / "report.md").read_text()


def test_other_weights_in_the_file_make_the_evaluation_stale(megu, finished, own):
    override = f"eval.oracle={own}"
    assert megu("eval", "-c", finished, "--set", override).code == 0
    torch.save({key: value * 1.01 for key, value in torch.load(own)["state_dict"].items()}, own)
    state = megu("status", "-c", finished, "--set", override, "--json").json["stages"]["eval"]
    assert (state["status"], state["reason"]) == ("stale", "changed: your own retrained model")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file, run: None, ["eval.oracle: no checkpoint at"]),
        (lambda file, run: torch.save({"a": torch.zeros(2)}, file), ["eval.oracle retrained.pth does not fit"]),
        (
            lambda file, run: torch.save(dict(load_file(run / "original.safetensors")), file),
            ["eval.oracle holds the weights of the original model"],
        ),
    ],
    ids=["missing", "another model", "the original"],
)
def test_an_oracle_that_is_none_is_refused_before_anything_runs(megu, finished, make, words):
    file = finished.parent / "retrained.pth"
    make(file, finished.parent / "run")
    refused(megu("run", "-c", finished, "--set", f"eval.oracle={file}"), *words)


def test_an_oracle_in_the_run_directory_is_refused(megu, finished):
    answer = megu("eval", "-c", finished, "--set", f"eval.oracle={finished.parent / 'run' / 'oracle.safetensors'}")
    refused(answer, "eval.oracle oracle.safetensors lies in the run directory")


@pytest.mark.parametrize(("oracle", "unlearned", "number"), [(0.76, 0.9, 0), (0.74, 0.9, 1), (0.8, 0.95, 1)])
def test_what_the_reader_must_know_is_said(oracle, unlearned, number):
    figures = {
        "original": {"retain_test_acc": 0.8, "forget_train_acc": 0.9},
        "oracle": {"retain_test_acc": oracle},
        "unlearned": {"forget_train_acc": unlearned},
    }
    assert len(warnings(figures)) == number


def test_an_oracle_well_below_the_original_is_said_everywhere(megu, tmp_path):
    config = write_config(tmp_path, train={"epochs": 8}, eval={"oracle": True})
    assert megu("train", "-c", config).code == 0
    original = tmp_path / "run" / "original.safetensors"
    target = tmp_path / "own.safetensors"
    target.write_bytes(original.read_bytes())
    poor = ["--set", f"model.checkpoint={target}", "--set", "train.epochs=1", "-o", tmp_path / "two"]
    answer = megu("run", "-c", config, *poor)
    assert answer.code == 0, answer.err
    assert "eval: warning: the oracle is well below the original" in answer.err
    assert "Warning: the oracle is well below the original" in " ".join(answer.out.split())
    found = json.loads((tmp_path / "two" / "eval.json").read_text())["warnings"]
    assert len(found) == 1
    assert megu("report", "-c", config, *poor, "--format", "md").code == 0
    assert "The oracle is well below the original" in (tmp_path / "two" / "report.md").read_text()


def test_no_oracle_is_trained_beside_ones_own(megu, finished, own):
    (finished.parent / "run" / "oracle.safetensors").unlink()
    answer = megu("train", "--retain-only", "-c", finished, "--set", f"eval.oracle={own}")
    refused(answer, "eval.oracle names your own retrained model, retrained.pth", "Set eval.oracle: true")
    assert not (finished.parent / "run" / "oracle.safetensors").exists()


def test_a_directory_of_transformers_is_ones_own_oracle(megu, tmp_path):
    for name, seed in (("mine", 0), ("retrained", 1)):
        torch.manual_seed(seed)
        transformers.AutoModelForImageClassification.from_config(VIT).save_pretrained(tmp_path / name)
    file = write_config(
        tmp_path,
        model={"name": "hf:mine", "preflight": False},
        eval={"oracle": "retrained"},
        labels={"proxy": {"images": 50, "passes": 1, "networks": 1}},
    )
    answer = megu("run", "-c", file, "--json")
    assert answer.code == 0, answer.err
    assert "retrained" in artifacts.read_meta(tmp_path / "run" / "eval.json")["inputs"]
    assert not (tmp_path / "run" / "oracle.safetensors").exists()
    # The figures are those of the model in the directory.
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "retrained").eval()
    data = RunContext.open(load_config(file)).inputs.data
    eights = data.test.at((data.test.labels == 8).nonzero()[:, 0])
    with torch.no_grad():
        says = model(next(iter(eights.batches([torch.arange(len(eights))])))).logits.argmax(1)
    assert answer.json["oracle"]["forget_test_acc"] == pytest.approx((says == 8).double().mean().item())
    other = megu("eval", "-c", file, "--set", f"eval.oracle={tmp_path / 'mine'}")
    refused(other, "eval.oracle holds the weights of the original model")
