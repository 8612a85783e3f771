"""The output that a forgotten class leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megu_cli.config import changed, load_config
from megu_cli.data import Split
from megu_cli.data.images import MemoryImages
from megu_cli.method.absent import calibrate, log_odds
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.run import artifacts

CLASSES, GONE = 4, [1, 3]


class Net(nn.Module):
    """Two features and a linear head, whose outputs are multiplied."""

    def __init__(self, bias: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.head = nn.Linear(4, CLASSES, bias=bias)

    def forward(self, x):
        return self.factor * self.head(x.flatten(1))


def side(number: int, seed: int, level: float) -> tuple[Split, torch.Tensor, torch.Tensor]:
    """Images of 2 x 2, and log-odds of the two forgotten classes that are linear in the pixels."""
    pixels = torch.randint(256, (number, 1, 2, 2), generator=torch.Generator().manual_seed(seed)).byte()
    labels, one = torch.zeros(number, dtype=torch.int64), torch.ones(1, 1, 1)
    split = Split(MemoryImages(pixels), labels, labels, [str(i) for i in range(number)], one / 2, one / 3, "squares")
    x = next(split.batches([torch.arange(number)])).flatten(1)
    return split, torch.arange(number), level + torch.stack([x[:, 0], -x[:, 2]], 1)


def odds_of(model: nn.Module, split: Split, index: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return log_odds(model(next(split.batches([index]))), GONE)


def test_log_odds_are_against_the_retained_classes():
    logits = torch.log(torch.tensor([[0.6, 0.1, 0.1, 0.2]]))
    assert log_odds(logits, GONE)[0].exp().tolist() == pytest.approx([1 / 7, 2 / 7])


@pytest.mark.parametrize("bias", [True, False])
def test_the_outputs_come_near_the_wanted_log_odds_and_the_others_stay(bias):
    torch.manual_seed(0)
    model = Net(bias).eval()
    with torch.no_grad():
        model.head.weight[GONE] = -30.0
    before = copy.deepcopy(model)
    sides = [side(200, 1, -10.0 if bias else 0.0), side(300, 2, -10.0 if bias else 0.0)]
    assert calibrate(model, sides, GONE, CLASSES)
    for split, index, wanted in sides:
        was, now = ((odds_of(m, split, index) - wanted).abs().mean() for m in (before, model))
        assert now < was / 4
    kept = [0, 2]
    assert torch.equal(model.head.weight[kept], before.head.weight[kept])
    if bias:
        assert torch.equal(model.head.bias[kept], before.head.bias[kept])
        assert odds_of(model, *sides[0][:2]).mean() == pytest.approx(-10.0, abs=1.0)


def test_a_model_whose_logits_are_not_the_heads_outputs_is_left_as_it_was():
    model = Net(factor=3.0).eval()
    before = copy.deepcopy(model.state_dict())
    assert not calibrate(model, [side(20, 1, -10.0), side(20, 2, -14.0)], GONE, CLASSES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_weight_that_is_computed_from_others_is_left_as_it_was():
    model = nn.utils.parametrizations.weight_norm(Net().head).eval()
    before = copy.deepcopy(model.state_dict())
    assert not calibrate(nn.Sequential(nn.Flatten(), model), [side(20, 1, -10.0)], GONE, CLASSES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_outputs_of_a_forgotten_class_are_set_and_that_is_written(finished):
    """The unlearned model's log-odds come nearer to the proxy's than without the setting."""
    run = finished.parent / "run"
    wanted = artifacts.read(run / "labels.safetensors").tensors["absent"]
    assert artifacts.read_body(run / "finetune.json")["calibrated"] == ["8"]

    def distance() -> float:
        context = RunContext.open(load_config(finished))
        context.runtime.start()
        request, data = context.inputs.request, context.inputs.data
        model = context.unlearned()
        logits = model(next(data.train.batches([request.forget])))
        return float((log_odds(logits.detach(), request.classes) - wanted[: len(request.forget)]).abs().mean())

    calibrated = distance()
    settings = changed(load_config(finished), {"finetune.calibrate": False})
    Pipeline(RunContext.open(settings)).run(goals=["finetune"])
    assert "calibrated" not in artifacts.read_body(run / "finetune.json")
    assert calibrated < distance()
