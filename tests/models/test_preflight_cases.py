"""Preflight names the right cause and value: 24 mistakes on three networks, and nothing where there is none."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from megu_cli.data.decode import Decode, Preprocessing, Resizing
from megu_cli.data.images import MemoryImages
from megu_cli.data.splits import Split
from megu_cli.models import preflight
from megu_cli.models.looks import Pictures, sizes
from megu_cli.models.networks import BUILTIN

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]
SIDE, EACH = 32, 50
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def photos(folder: Path) -> list[str]:
    """Dim stripes of three periods in red or green, as JPEG files of 64 pixels, sorted by class."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    names = []
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        period, red = (6.0, 11.0, 20.0)[label % 3], label < 3
        for i in range(EACH):
            angle, phase, level = torch.rand(3, generator=draw).tolist()
            along = rows * torch.tensor(angle * 3.14).cos() + columns * torch.tensor(angle * 3.14).sin()
            wave = 14 * (along * 6.283 / period + 6.283 * phase).sin() + 45 + 12 * level
            grain = 4 * torch.randn(3, 64, 64, generator=draw)
            tint = torch.tensor([10.0, 0, -10.0] if red else [-10.0, 10.0, 0.0]).view(3, 1, 1)
            pixels = (wave + tint + grain).clamp(0, 255).byte().permute(1, 2, 0).numpy()
            names.append(f"{name}/{i:03d}.jpg")
            Image.fromarray(pixels).save(folder / names[-1], quality=95)
    return names


class Plain(nn.Module):
    """Convolutions without normalisation layers."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(48, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Patches(nn.Module):
    """A small vision transformer that takes one size."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, 48, 8, 8)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, classes)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2) + self.place).mean(1))


NETWORKS = {"resnet": BUILTIN["small_resnet"], "plain": Plain, "patches": Patches}


TRUE = {"resnet": None, "plain": HALF, "patches": IMAGENET}  # None: the folder's own
STEPS = {"resnet": 100, "plain": 450, "patches": 400}


@dataclass
class World:
    """A folder of photos, and weights that were trained on it."""

    folder: Path
    names: list[str]
    models: dict[str, nn.Module]

    def split(self, side: int, normalisation=None) -> Split:
        """The folder as it is loaded: class after class, by default with its own mean and deviation."""
        decode = Decode(Resizing(side), 3)
        pixels = torch.stack([decode(name, (self.folder / name).read_bytes()) for name in self.names])
        values = pixels.float().div(255).transpose(0, 1).flatten(1)
        mean, std = normalisation or (values.mean(1).tolist(), values.std(1).tolist())
        labels = torch.arange(len(NAMES)).repeat_interleave(EACH)
        return Split(MemoryImages(pixels), labels, labels, self.names, *map(column, (mean, std)), "x")

    def model(self, network: str) -> nn.Module:
        if network not in self.models:
            torch.manual_seed(0)
            split = self.split(SIDE, TRUE[network])
            self.models[network] = fit(NETWORKS[network](len(NAMES), 3), split, STEPS[network])
        return self.models[network]

    def found(self, model: nn.Module, side: int, normalisation) -> preflight.Finding:
        split, prepared = self.split(side, normalisation), Preprocessing(image_size=side)
        return preflight.examine(model, split, NAMES, root=self.folder, prepared=prepared)


def column(values) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1).expand(3, 1, 1)


def fit(model: nn.Module, split: Split, steps: int) -> nn.Module:
    (x,) = split.batches([torch.arange(len(split))])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(0, len(x), (48,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), split.labels[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("photos")
    return World(folder, photos(folder), {})


class Turned(nn.Module):
    """Takes blue, green, red."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.flip(1))


ORDER = [1, 2, 0, 3, 5, 4]


def reordered(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for values in (other.head.weight.data, other.head.bias.data):
        values.copy_(values[ORDER].clone())
    return other


# What is wrong -> the side and the normalisation that the config gives, and what is done to the model.
NONE, BYTES = ((0.0,), (1.0,)), ((0.0,), (1 / 255,))
WRONG = {
    "size, too large": (96, "true", None),
    "size, too small": (20, "true", None),
    "normalisation": (SIDE, "other", None),
    "no normalisation": (SIDE, NONE, None),
    "both, too large": (96, "other", None),
    "both, too small": (20, NONE, None),
    "order of channels": (SIDE, "true", Turned),
    "order of classes": (SIDE, "true", reordered),
}


def given(world: World, network: str, normalisation):
    """The mean and deviation that a config gives."""
    if normalisation == "other":
        return HALF if network == "patches" else IMAGENET
    if normalisation == "true":
        own = world.split(SIDE)
        return TRUE[network] or (own.mean.flatten().tolist(), own.std.flatten().tolist())
    return normalisation


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_right_cause_and_value_are_named(world, network, wrong):
    side, normalisation, change = WRONG[wrong]
    model = world.model(network)
    found = world.found(change(model) if change else model, side, given(world, network, normalisation))
    expected = {"data.image_size"} if side != SIDE else set()
    expected |= {"model.mean", "model.std"} if normalisation != "true" else set()
    expected |= {"model.classes"} if change is reordered else set()
    # The normalisations here differ from channel to channel, all but that of "plain".
    uneven = {"model.mean", "model.std"} if network != "plain" else set()
    expected |= {"model.channel_order", *uneven} if change is Turned else set()
    assert found.settings.keys() == expected, found
    assert found.settings.get("data.image_size", SIDE) == SIDE
    if normalisation != "true":
        mean, std = given(world, network, "true")
        torch.testing.assert_close(column(found.settings["model.mean"]), column(mean), rtol=0.02, atol=0)
        torch.testing.assert_close(column(found.settings["model.std"]), column(std), rtol=0.06, atol=0)
    if change is reordered:
        assert found.settings["model.classes"] == [NAMES[i] for i in ORDER]
    assert ("red and blue exchanged" in found.cause) == (change is Turned)
    assert found.cause.endswith("it would be 100%")
    for key in found.settings.keys() - {"model.classes"}:
        assert f"{key}: " in found.hint


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_is_said_where_all_is_right(world, network):
    found = world.found(world.model(network), SIDE, given(world, network, "true"))
    assert found == preflight.Finding("100.0% of 300 training images classified right (chance 16.7%)", low=False)


def test_the_sample_has_as_many_of_each_class(world):
    split = world.split(SIDE)
    pictures = Pictures(split, 75, None, Preprocessing())
    for number in (12, 60, 75):
        counts = torch.bincount(pictures.labels[:number], minlength=len(NAMES))
        assert counts.max() - counts.min() <= 1
    assert len(set(pictures.names)) == 75


def test_sizes_are_decoded_from_the_files_and_not_from_what_was_scaled_down(world):
    split = world.split(8)
    pictures = Pictures(split, 6, world.folder, Preprocessing(image_size=8))
    again = [Decode(Resizing(32), 3)(name, (world.folder / name).read_bytes()) for name in pictures.names]
    assert torch.equal(pictures.pixels(32, 6), torch.stack(again))
    assert pictures.native() == 64
    blurred = Pictures(split, 6, None, Preprocessing()).pixels(32, 6)
    assert (blurred.float() - torch.stack(again).float()).abs().mean() > 1


def test_from_a_large_size_small_ones_are_tried_as_well(world):
    """Networks of 32 pixels are many, and a config begins with 224."""
    pictures = Pictures(world.split(224), 6, world.folder, Preprocessing(image_size=224))
    assert {16, 32, 64, 96} <= {*sizes(pictures, None)}
    assert min(sizes(pictures, None)) == 16  # a quarter of the photos' own 64
    assert min(sizes(Pictures(world.split(224), 6, None, Preprocessing()), None)) == 32
    assert min(sizes(Pictures(world.split(SIDE), 6, None, Preprocessing()), None)) >= SIDE / 4
