"""Outputs without images: the finetuning keeps them where they were."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import write_config
from test_method import Linear, finetuned, forgotten, halves
from torch import nn

from megu_cli.config import FinetuneConfig, load_config
from megu_cli.config.presets import preset_settings
from megu_cli.method.distillation import Distillation
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.stages import STAGES
from megu_cli.run.artifacts import state_digest

ABSENT = torch.tensor([False, True, False, True])


def test_the_loss_is_the_divergence_with_the_other_outputs_as_one():
    torch.manual_seed(0)
    original, x = nn.Linear(5, 4), torch.randn(6, 5)
    term = Distillation(original, ABSENT)
    changed = copy.deepcopy(original)
    assert term.loss(x, original(x)).item() == pytest.approx(0.0, abs=1e-5)
    nn.init.normal_(changed.weight, std=3.0)
    expected = 0.0
    for before, now in zip(original(x).tolist(), changed(x).tolist(), strict=True):
        p, q = ([math.exp(z / 8) / sum(math.exp(v / 8) for v in row) for z in row] for row in (before, now))
        p, q = ([row[1], row[3], row[0] + row[2]] for row in (p, q))
        expected += 64 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(x)
    assert term.loss(x, changed(x)).item() == pytest.approx(expected, rel=1e-4)
    # Which of the outputs with images an image is given is not its concern.
    swapped = original(x)[:, [2, 1, 0, 3]]
    assert term.loss(x, swapped).item() == pytest.approx(0.0, abs=1e-5)
    assert term.loss(x[:0], changed(x[:0])).item() == 0


class Three(Linear):
    """A network without batch norm, whose third output no image is of."""

    def forward(self, x):
        return self.head(torch.stack([x[:, 0, :, :2].mean((1, 2)), x[:, 0, :, 2:].mean((1, 2))], 1))


def begun() -> Three:
    model = Three()
    with torch.no_grad():
        model.head.weight[2] = torch.tensor([1.0, -2.0])
    return model


def run(distillation: float, absent: torch.Tensor | None, accumulate: int = 1) -> Three:
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    model = begun()
    request = forgotten(gone, 1, [0, 1.0, 0])
    finetuned(model, split, kept, request, distillation=distillation, without_images=absent, accumulate=accumulate)
    return model.eval()


def test_outputs_without_images_stay_where_they_were_on_retained_images():
    split = halves()
    x = next(split.batches([torch.where(split.labels == 1)[0]]))

    def odds(model: nn.Module) -> torch.Tensor:
        return (model(x)[:, 2] - model(x)[:, :2].logsumexp(1)).mean()

    before = odds(begun())
    moved = [(odds(run(weight, torch.tensor([False, False, True]))) - before).abs().item() for weight in (0.0, 1.0)]
    assert moved[1] < 0.5 * moved[0]


def test_a_step_in_slices_has_the_same_loss():
    absent = torch.tensor([False, False, True])
    whole, sliced = (run(1.0, absent, accumulate).head.weight for accumulate in (1, 3))
    assert torch.allclose(whole, sliced, atol=1e-5)
    assert not torch.allclose(whole, run(0.0, absent).head.weight, atol=1e-3)


def test_nothing_changes_where_every_output_has_images():
    none = torch.zeros(3, dtype=torch.bool)
    digests = {state_digest(run(*given).state_dict()) for given in ((1.0, none), (1.0, None), (0.0, none))}
    assert len(digests) == 1


def inputs_of(file, *overrides: str) -> set[str]:
    """The inputs in the key of the finetuning that depend on the data."""
    from megu_cli.pipeline.freshness import Freshness

    context = RunContext.open(load_config(file, list(overrides)))
    return set(Freshness(context)._given(STAGES["finetune"])) & {"outputs_without_images"}


def test_it_enters_the_key_of_the_finetuning_only_where_there_are_such_outputs(tmp_path):
    assert "distillation" not in FinetuneConfig().keyed()
    assert "distillation" not in FinetuneConfig(distillation=0).keyed()  # a result from before there was one
    assert FinetuneConfig(distillation=2).keyed()["distillation"] == 2
    assert preset_settings("paper")["finetune.distillation"] == 0

    from PIL import Image

    for name in ("a", "b", "c"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("L", (8, 8), 3 * i + ord(name)).save(tmp_path / "photos" / name / f"{i}.png")
    data = {"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None}
    file = write_config(tmp_path, data=data, forget={"classes": ["c"]}, mllm={"backend": "none"})
    more = "model.classes=[a,x,b,c,y]"
    assert inputs_of(file) == set()
    assert inputs_of(file, more) == {"outputs_without_images"}
    assert inputs_of(file, more, "finetune.distillation=0") == set()
    context = RunContext.open(load_config(file, [more]))
    assert context.inputs.without_images == [1, 4]
    assert any(note.startswith("2 of 5 outputs have no images") for note in context.inputs.notes)
    assert not any("no images" in note for note in RunContext.open(load_config(file)).inputs.notes)
