"""Models and strict checkpoints."""

from __future__ import annotations

import pytest
import torch

from megu_cli import models
from megu_cli.errors import CheckpointError
from megu_cli.runtime import seeded


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("small_cnn", 1, 8), ("small_resnet", 1, 28), ("resnet18", 3, 32), ("torchvision:mobilenet_v3_small", 3, 64)],
)
def test_every_model_classifies_and_shows_its_features(name, channels, size):
    with seeded(0, "test"):
        model = models.build(name, 7, channels).eval()
    x = torch.rand(2, channels, size, size)
    with models.penultimate(model, 7) as features:
        assert model(x).shape == (2, 7)
    assert features[0].ndim == 2
    assert torch.allclose(models.classifier(model, 7)(features[0]), model(x), atol=1e-5)


def test_the_cifar_resnet18_is_the_fields_own():
    model = models.build("resnet18", 10, 3)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert model.blocks(model.stem(torch.rand(1, 3, 32, 32))).shape == (1, 512, 4, 4)


def test_a_re_initialisation_differs_in_every_random_layer():
    states = []
    for path in ("train", "oracle"):
        with seeded(0, path, "init"):
            states.append(models.build("small_resnet", 10, 1).state_dict())
    for key in states[0]:
        if states[0][key].ndim > 1 or key == "head.bias":
            assert not torch.equal(states[0][key], states[1][key]), key


def test_seeding_a_block_leaves_the_outside_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with seeded(0, "a"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(0, "a"):
        assert torch.equal(torch.rand(3), inside)


def test_an_unlearned_state_takes_the_dtypes_of_the_input():
    state = {"w": torch.rand(2, 2), "n": torch.tensor(3)}
    original = {"n": torch.tensor(1), "w": torch.rand(2, 2).half()}
    result = models.like(state, original)
    assert list(result) == ["n", "w"]
    assert result["w"].dtype == torch.half
    assert result["n"].dtype == torch.int64


def test_a_half_precision_checkpoint_is_loaded_and_written_as_such(tmp_path):
    model = models.build("small_cnn", 10, 1)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    read = models.read_checkpoint(tmp_path / "half.pth")
    loaded = models.load_state(models.build("small_cnn", 10, 1), read, "half.pth")
    assert next(loaded.parameters()).dtype == torch.float32
    assert {v.dtype for v in models.like(loaded.state_dict(), read).values()} == {torch.float16, torch.int64}


def test_frozen_restores_what_it_found():
    model = models.build("small_cnn", 10, 1).train()
    first = next(model.parameters()).requires_grad_(False)
    with models.frozen(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not first.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1


def test_a_model_without_a_head_of_that_size():
    with pytest.raises(CheckpointError, match="no final layer with 9 outputs"):
        models.classifier(models.build("small_cnn", 10, 1), 9)
