"""The one loop."""

from __future__ import annotations

import pytest
import torch
from conftest import data_set
from joblib.externals import loky
from torch import nn

from megu_cli import data, training
from megu_cli.config import FinetuneConfig, TrainConfig
from megu_cli.errors import MeguError
from megu_cli.execution import Execution
from megu_cli.execution.runtime import derive, limit_threads, seeded
from megu_cli.models.sources import build
from megu_cli.run.artifacts import state_digest
from megu_cli.training import loop

RECIPE = {
    "epochs": 3,
    "batch": 32,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "augment": "none",
}


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data_set("digits", limit=300)


def trained(digits: data.Dataset, label="train", seed=0, **changes) -> tuple[nn.Module, training.History]:
    with seeded(0, "init"):
        model = build("small_cnn", 10, 1)
    history = training.train_classifier(
        model,
        digits.train,
        torch.arange(300),
        TrainConfig(**{**RECIPE, **changes}),
        label=label,
        execution=Execution(seed=seed),
    )
    return model, history


def test_training_learns(digits):
    model, history = trained(digits, epochs=6)
    assert history.steps == 60
    assert history.loss[-1] < 0.3 < history.loss[0]
    assert training.accuracy(model, digits.test, torch.arange(len(digits.test))) > 0.85
    assert not model.training


def test_the_same_seed_gives_the_same_bytes(digits):
    same = state_digest(trained(digits)[0].state_dict())
    torch.rand(5)
    assert state_digest(trained(digits)[0].state_dict()) == same
    for change in ({"seed": 1}, {"augment": "flip"}, {"augment": "crop+flip"}, {"label": "oracle"}):
        assert state_digest(trained(digits, **change)[0].state_dict()) != same


def test_a_loss_that_is_no_longer_finite_is_said(digits):
    with pytest.raises(MeguError, match=r"the loss is (nan|inf)"):
        trained(digits, lr=1e12)


class Normed(nn.Module):
    """A network with layer norm, which counts its forward passes and the most images of one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 10))
        self.passes = self.most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes, self.most = self.passes + self.training, max(self.most, len(x))
        return self.body(x)


@pytest.mark.parametrize(
    ("batch", "accumulate", "passes", "most"),
    [
        (32, 4, 2 * (3 * 4 + 2), 8),  # a last batch of 4
        (23, 4, 2 * (4 * 4 + 4), 6),  # a last batch of 8
        (40, 7, 2 * (2 * 7 + 7), 6),  # slices of 5 and 6; a last batch of 20, in slices of 2 and 3
        (5, 8, 2 * 20 * 2, 3),  # a batch smaller than the slices asked for: two samples at least in each
        (3, 8, 2 * 34, 3),
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(digits, batch, accumulate, passes, most):
    states, losses = [], []
    for slices in (1, accumulate):
        with seeded(0, "init"):
            model = Normed()
        recipe = TrainConfig(epochs=2, batch=batch, lr=0.05, augment="crop+flip", accumulate=slices)
        history = training.train_classifier(model, digits.train, torch.arange(100), recipe, label="train")
        states.append(model.state_dict())
        losses.append(history.loss)
    assert (model.passes, model.most) == (passes, most)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for key, value in states[0].items():
        assert (value - states[1][key]).abs().max() < 1e-6


def test_dropout_draws_from_the_seed_and_not_from_the_past(digits):
    def run() -> str:
        with seeded(0, "init"):
            model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        recipe = TrainConfig(**{**RECIPE, "epochs": 1})
        training.train_classifier(model, digits.train, torch.arange(100), recipe, label="train")
        return state_digest(model.state_dict())

    first = run()
    torch.rand(11)
    assert run() == first


def test_shuffled_batches_use_everything_once_before_anything_twice():
    index = torch.arange(10, 20)
    batches = training.shuffled(index, 25, 8, 0, "x")
    # Never a last batch of one: batch norm could not take its variance.
    assert [len(b) for b in batches] == [8, 8, 7, 2]
    flat = torch.cat(batches)
    assert sorted(flat[:10].tolist()) == sorted(flat[10:20].tolist()) == index.tolist()
    assert len(set(flat[20:].tolist())) == 5
    assert not torch.equal(flat[:10], flat[10:20])


def test_predictions_are_in_order_and_leave_the_model_as_it_was(digits):
    model, _ = trained(digits)
    model.train()
    index = torch.tensor([5, 3, 250])
    outputs = training.predict(model, digits.train, index, classes=10, execution=Execution(eval_batch=2))
    assert model.training
    model.eval()
    for row, i in enumerate(index):
        x = next(digits.train.batches([i[None]]))
        assert torch.allclose(outputs.logits[row], model(x)[0], atol=1e-5)
    assert outputs.features.shape == (3, 64)
    empty = training.predict(model, digits.train, index[:0], classes=10)
    assert empty.logits.shape == (0, 10)


def test_a_crop_moves_and_a_flip_mirrors():
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    draw = torch.Generator().manual_seed(0)
    flipped = loop._augmented(x, loop._drawn(200, "flip", draw))
    same = (flipped == x).flatten(1).all(1)
    assert 60 < same.sum() < 140
    assert torch.equal(flipped[~same], x[~same].flip(3))
    cropped = loop._augmented(x, loop._drawn(200, "crop+flip", draw))
    assert cropped.shape == x.shape
    windows = [
        nn.functional.pad(image, (4, 4, 4, 4))[top : top + 8, left : left + 8]
        for image in (x[0, 0], x[0, 0].flip(1))
        for top in range(9)
        for left in range(9)
    ]
    assert all(any(torch.equal(image[0], window) for window in windows) for image in cropped[:20])


def test_random_streams_are_pinned():
    # A literal: another value would change every result for a given seed.
    assert derive(0, "finetune", 1, "noise") == derive(0, "finetune", 1, "noise")
    assert derive(0, "a", "b") != derive(0, "a/c") != derive(1, "a", "b")
    assert derive(0, "train", "init") == 5_876_366_845_753_338_366


@pytest.mark.parametrize(
    ("size", "device", "images"),
    [
        ((28, 28), "cuda", 1000), ((28, 28), "cpu", 250), ((64, 64), "cuda", 1000), ((224, 224), "cuda", 81),
        ((224, 224), "cpu", 81), ((9000, 9000), "cpu", 1),
    ],
)  # fmt: skip
def test_fewer_of_larger_images_go_through_a_model_at_a_time(size, device, images):
    assert training.eval_batch(size, torch.device(device)) == images


def test_adamw_learns_with_the_rate_of_its_own(digits):
    _, history = trained(digits, epochs=6, optimizer="adamw", lr="auto")
    assert history.loss[-1] < 0.3 < history.loss[0]
    assert TrainConfig(optimizer="adamw").peak_lr == 0.001
    assert TrainConfig().peak_lr == TrainConfig(lr=0.1).peak_lr == 0.1


def test_settings_that_came_later_stay_out_of_the_key_at_their_default():
    # As it was before there was another optimizer, and before there were slices.
    old = {"epochs": 15, "batch": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "augment": "none"}
    assert TrainConfig().keyed() == old
    assert TrainConfig(optimizer="adamw").keyed() == {**old, "lr": 0.001, "optimizer": "adamw"}
    assert TrainConfig(accumulate=4).keyed() == {**old, "accumulate": 4}
    assert "accumulate" not in FinetuneConfig().keyed()
    assert FinetuneConfig(accumulate=2).keyed() == {**FinetuneConfig().keyed(), "accumulate": 2}


def test_torch_takes_no_more_threads_than_the_container_may_use_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(loky, "cpu_count", lambda: 2)
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        limit_threads()
        assert torch.get_num_threads() == 3  # as the user has set it
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
