"""`finetune.lr: auto`: a rate that damages the model gives way to a lower one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megu_cli.config import changed, load_config
from megu_cli.evaluation.warnings import warnings
from megu_cli.method import problem as problems
from megu_cli.method.unlearn import _least
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.run import artifacts


def finetuned(file, said, **settings):
    """Body and weights of the finetuning of a finished run with other settings."""
    config = changed(load_config(file), {f"finetune.{key}": value for key, value in settings.items()})
    Pipeline(RunContext.open(config), said.append).run(goals=["finetune"])
    return artifacts.read_body(config.out / "finetune.json"), load_file(config.out / "model.safetensors")


@pytest.mark.parametrize("bad", [1.0, 1e8])
def test_a_rate_that_damages_the_model_gives_way_to_a_lower_one(finished, monkeypatch, bad):
    """Too high a rate leaves a constant answer, a far too high one no finite loss."""
    said: list[str] = []
    body, expected = finetuned(finished, said, lr=0.002)
    assert body["lr"] == 0.002
    monkeypatch.setattr(problems, "_RATES", (bad, 0.002))
    body, weights = finetuned(finished, said, lr="auto")
    assert body["lr"] == 0.002
    (line,) = [line for line in said if "finetuned once more at a lower one" in line]
    assert ("loss was no longer finite" in line) == (bad > 1)
    assert ("accuracy on held-out images was" in line) == (bad <= 1)
    assert all(torch.equal(expected[name], value) for name, value in weights.items())


def test_few_images_are_no_proof_of_damage():
    assert _least(1.0, 1000) == pytest.approx(0.95)
    assert _least(1.0, 5) < 0.8


def test_a_damaged_model_is_said():
    evaluation = {"original": {"retain_test_acc": 0.94}, "unlearned": {"retain_test_acc": 0.12}}
    assert "the unlearned model is damaged: it classifies 12.0%" in warnings(evaluation)[0]
    assert not warnings({**evaluation, "unlearned": {"retain_test_acc": 0.92}})
