"""Preflight: the usual mistakes are caught before any work, and named."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file, save_file
from torch import nn

from megu_cli.config import load_config
from megu_cli.data import MemoryImages, Split
from megu_cli.errors import CheckpointError
from megu_cli.models import preflight
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.original import OriginalModel

NAMES = ["ant", "bee", "cat", "dog"]


def pictures(channels: int = 3, side: int = 16, number: int = 600) -> Split:
    """Images whose class is the quarter of their height with a bright bar, red in colour images."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 4
    pixels = torch.randint(0, 30, (number, channels, side, side), generator=draw)
    quarter = side // 4
    for row in range(quarter):
        pixels[torch.arange(number), 0, labels * quarter + row] += 120
    names = [f"train/{i}" for i in range(number)]
    mean, std = torch.full((channels, 1, 1), 0.5), torch.full((channels, 1, 1), 0.5)
    return Split(MemoryImages(pixels.byte()), labels, labels, names, mean, std, "x")


class Bars(nn.Module):
    """Knows where the bars are in images of 16 pixels whose first channel is between -1 and 1, and nothing else."""

    def __init__(self, order=(0, 1, 2, 3)) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight.data = torch.eye(4)[list(order)]

    def forward(self, x):
        x = nn.functional.pad(x[:, :1], (0, 0, 0, max(0, 16 - x.shape[2])))[:, :, :16]
        lit = ((x > -0.3) & (x < 0.3)).float().mean((1, 3))
        return self.head(lit.view(-1, 4, 4).mean(2))


class Same(nn.Module):
    """Says the same of every image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 4)

    def forward(self, x):
        return self.head(torch.zeros(len(x), 1))


def check(model, split, **given):
    return preflight.check(model.eval(), split, NAMES, **given)


def test_a_model_that_fits():
    split = pictures()
    assert check(Bars(), split) == "100.0% of 500 training images classified right (chance 25.0%)"
    assert ", expected 99.0%)" in check(Bars(), split, expected=0.99)
    with pytest.raises(CheckpointError, match="no other order"):
        check(Same(), split)


def told(model, split, **given) -> CheckpointError:
    with pytest.raises(CheckpointError) as failure:
        check(model, split, **given)
    assert "Set model.preflight: false to continue anyway" in failure.value.hint
    return failure.value


def test_another_order_of_the_classes():
    error = told(Bars((1, 2, 0, 3)), pictures())
    assert (
        "the order of the classes differs: the model says 'ant' for images of 'bee', 'bee' for images of 'cat', 'cat' "
    )
    assert "in the other order it would be 100%" in error.message.lower()
    assert "that is: ['bee', 'cat', 'ant', 'dog']" in error.hint
    # Two of four exchanged: half is right, and it is told all the same.
    assert "['bee', 'ant', 'cat', 'dog']" in told(Bars((1, 0, 2, 3)), pictures()).hint


def test_another_normalisation():
    split = pictures()
    wrong = dataclasses.replace(split, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    error = told(Bars(), wrong)
    assert "with mean 0.5 and deviation 0.5 it would be 100%" in error.message
    assert "Set model.mean: [0.5] and model.std: [0.5]." in error.hint
    odd = dataclasses.replace(split, mean=torch.full((3, 1, 1), 0.1), std=torch.full((3, 1, 1), 0.02))
    assert "Set model.mean: [0.5] and model.std: [0.5]." in told(Bars(), odd).hint
    # What a data set is normalised with by itself is tried as well.
    there = dataclasses.replace(split, images=MemoryImages(split.images.pixels // 4), mean=split.mean / 9)
    assert "with the data set's own normalisation it would be" in told(Bars(), there, own=((0.125,), (0.125,))).message


def test_red_and_blue_exchanged():
    split = pictures()
    swapped = dataclasses.replace(split, images=MemoryImages(split.images.pixels.flip(1)))
    error = told(Bars(), swapped)
    assert "with red and blue exchanged it would be 100%" in error.message
    assert error.hint.startswith("Set model.channel_order: bgr.")
    found = preflight.examine(Bars().eval(), dataclasses.replace(swapped, bgr=True), NAMES)
    assert found.line.startswith("100.0% of")
    assert found.fault is None


def test_another_size():
    error = told(Bars(), pictures(side=32))
    assert error.hint.startswith("Set data.image_size: 16.")
    assert "with images of 16 x 16 pixels it would be 100%" in error.message


def test_size_and_normalisation_at_once():
    wrong = dataclasses.replace(pictures(side=32), mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    error = told(Bars(), wrong)
    assert "with images of 16 x 16 pixels and mean 0.5 and deviation 0.5 it would be 100%" in error.message
    assert error.hint.startswith("Set data.image_size: 16, model.mean: [0.5] and model.std: [0.5].")


def test_a_folder_that_is_sorted_by_class():
    split = pictures()
    order = split.labels.argsort(stable=True)
    wrong = dataclasses.replace(split.at(order), mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    error = told(Bars(), wrong)
    assert "with mean 0.5 and deviation 0.5 it would be 100%" in error.message
    assert "(chance 25.0%)" in error.message


def test_the_mean_and_deviation_of_the_images_themselves_are_tried():
    split = pictures()
    values = split.images.pixels.float().div(255).transpose(0, 1).flatten(1)
    mean, std = values.mean(1)[0].item(), values.std(1)[0].item()

    class Own(Bars):
        def forward(self, x):
            return super().forward((x * std + mean - 0.5) / 0.5)

    hint = told(Own(), split).hint
    found = [float(v) for v in hint.split("model.mean: [")[1].split("]")[0].split(", ")]
    assert abs(found[0] - mean) < 0.01


def test_a_size_that_the_model_does_not_take_at_all():
    class Only16(Bars):
        def forward(self, x):
            if x.shape[-1] != 16:
                raise RuntimeError("16 only")
            return super().forward(x)

    error = told(Only16(), pictures(side=32))
    assert (
        "the model takes no images of 32 x 32 pixels; with images of 16 x 16 pixels it would be 100%" in error.message
    )


def test_progress_is_told():
    labels = []

    @contextlib.contextmanager
    def track(label, total):
        labels.append([label, total, 0])

        def advance():
            labels[-1][2] += 1

        yield advance

    wrong = dataclasses.replace(pictures(), mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    told(Bars(), wrong, track=track)
    assert [row[0] for row in labels] == ["preflight", "preflight: other sizes and normalisations"]
    assert all(done == total > 1 for _, total, done in labels)


def test_an_accuracy_that_is_expected_and_not_there():
    split = pictures()
    flipped = split.labels.clone()
    flipped[::3] = (flipped[::3] + torch.arange(len(flipped))[::3] // 12 % 3 + 1) % 4
    noisy = dataclasses.replace(split, labels=flipped)
    assert check(Bars(), noisy).startswith("6")
    assert "expected 95.0%); no other order of classes" in told(Bars(), noisy, expected=0.95).message


def test_many_classes_in_another_order():
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    says, labels = torch.arange(3000), order
    assert preflight._match(says[:900].numpy(), labels[:900].numpy()) == dict(enumerate(order[:900].tolist()))
    matched = preflight._match(says.numpy(), labels.numpy())
    assert matched.items() <= dict(enumerate(order.tolist())).items()


def test_of_very_many_classes_the_most_frequent_are_matched():
    rare, often = torch.arange(1500), torch.arange(2000, 2500).repeat(5)
    says, labels = torch.cat([rare, often]), torch.cat([rare, 4499 - often])
    matched = preflight._match(says.numpy(), labels.numpy())
    assert {output: matched.get(output) for output in range(2000, 2500)} == {i: 4499 - i for i in range(2000, 2500)}


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict:
    """Weights that know the digits."""
    folder = tmp_path_factory.mktemp("trained")
    config = load_config(write_config(folder, train={"epochs": 8, "lr": 0.02}))
    config.out.mkdir()
    Pipeline(RunContext.open(config)).build(["train"])
    return load_file(config.out / "original.safetensors")


def mine(tmp_path, state, order=range(10)):
    """A run on a checkpoint of the user's own, whose classes may come in another order."""
    weights = {k: v[list(order)].contiguous() if k.startswith("head.") else v for k, v in state.items()}
    save_file(weights, tmp_path / "mine.safetensors")
    return ["run", "-c", write_config(tmp_path, model={"checkpoint": "mine.safetensors"})]


def test_the_command_line_says_what_it_found(megu, tmp_path, state):
    command = mine(tmp_path, state)
    answer = megu(*command)
    assert answer.code == 0, answer.err
    assert "\npreflight: 9" in answer.err
    assert "of 400 training images classified right (chance 13.0%)" in answer.err
    assert "preflight" not in megu(*command).err  # nothing is computed
    assert "preflight" not in megu(*command, "--force", "--set", "model.preflight=false").err


def test_ratings_that_are_missing_are_said_before_images_and_weights_are_read(megu, tmp_path, state, monkeypatch):
    command = mine(tmp_path, state)
    ratings = tmp_path / "ratings.json"
    monkeypatch.setattr(OriginalModel, "weights", property(lambda self: pytest.fail("the checkpoint was read")))
    unread = dataclasses.replace(INPUTS["train_data"], digest=lambda work: pytest.fail("the images were read"))
    monkeypatch.setitem(INPUTS, "train_data", unread)
    answer = megu(*command, "--set", f"mllm.ratings={ratings}")
    assert (answer.code, "no recorded ratings at" in answer.err) == (2, True)
    ratings.write_text('{"classes": ["8", "1"], "scores": {"8": {"1": 3}}, "rater": "this test"}')
    answer = megu(*command, "--set", f"mllm.ratings={ratings}")
    assert answer.code == 2
    assert "row '8' has no rating of '0', '2'," in answer.err
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_what_megu_trained_itself_is_not_looked_into(megu, tmp_path, finished_folder):
    original = finished_folder / "run" / "original.safetensors"
    answer = megu("run", "-c", write_config(tmp_path), "--set", f"model.checkpoint={original}")
    assert answer.code == 0
    assert "preflight" not in answer.err


def test_the_command_line_stops_before_any_work(megu, tmp_path, state):
    order = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    command = mine(tmp_path, state, order)
    answer = megu(*command)
    assert answer.code == 2
    assert "the order of the classes differs: the model says '0' for images of '1', '1' for images of '2'" in answer.err
    names = str([str(i) for i in order])
    assert f"by what it says that is: {names}." in answer.err
    assert not list((tmp_path / "run").glob("*.safetensors"))
    given = ("--set", f"model.classes={names}", "--set", "model.expected_accuracy=0.95")
    answer = megu(*command, *given)
    assert answer.code == 0
    assert "(chance 13.0%, expected 95.0%)" in answer.err
    wrong = ("--set", "model.mean=[-3]", "--set", "model.std=[0.1]")
    answer = megu(*command, "--set", f"model.classes={names}", *wrong)
    assert answer.code == 2
    assert "with the data set's own normalisation it would be" in answer.err
    assert "Set model.mean: [0.3] and model.std: [0.37]." in answer.err


def test_megu_check_names_the_cause_and_writes_nothing(megu, tmp_path, state):
    command = ["check", *mine(tmp_path, state)[1:]]
    answer = megu(*command)
    assert answer.code == 0, answer.err
    assert "of 400 training images classified right (chance 13.0%): nothing to change" in answer.out
    answer = megu(*command, "--set", "model.mean=[-3]", "--set", "model.std=[0.1]")
    assert answer.code == 2
    assert "Set model.mean: [0.3] and model.std: [0.37]." in answer.err
    answer = megu(*command, "--set", "model.mean=[-3]", "--set", "model.std=[0.1]", "--json")
    assert (answer.code, answer.json["settings"]) == (2, {"model.mean": [0.3], "model.std": [0.37]})
    answer = megu("check", "-c", write_config(tmp_path / "none"))
    assert (answer.code, "there is no checkpoint to check" in answer.err) == (2, True)
    assert not (tmp_path / "run").exists()
