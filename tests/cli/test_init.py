"""`megu init`: what it takes, and what it finds out from the model and the images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_done import photos

from megu_cli.config import load_config

FACTORY = """
import torch
from torch import nn

class Corners(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if x.shape[-1] != {side}:
            raise RuntimeError("only {side}")
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).mean(1).flatten(1))

def make(classes, channels):
    return Corners()
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Photos of 8 pixels, and a network that knows in which corner each class is bright."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    weights = 8 * torch.eye(4)[:3] - 2
    torch.save({"head.weight": weights, "head.bias": torch.zeros(3)}, tmp_path / "mine.pth")
    return tmp_path


def made(project: Path, side: int) -> str:
    name = f"net{side}"
    (project / f"{name}.py").write_text(FACTORY.format(side=side))
    return f"python:./{name}:make"


def test_its_options_go_into_the_file(megu, project):
    (project / "ratings.json").write_text("{}")
    answer = megu(
        "init", "--images", "photos", "--model", made(project, 8), "--image-size", "8", "--class", "bee",
        "--already", "first", "--already", "old.csv", "--out", "runs/bee", "--ratings", "ratings.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    config = load_config(project / "megu.yaml")
    assert config.data.image_size == 8
    assert [path.name for path in config.forget.already] == ["first", "old.csv"]
    assert config.out == project / "runs" / "bee"
    assert (config.mllm.ratings, config.mllm.backend) == (project / "ratings.json", "recorded")
    assert "no ratings" not in answer.out


@pytest.mark.parametrize("side", [8, 32])
def test_the_size_is_that_with_which_the_checkpoint_is_right(megu, project, side):
    model = made(project, side)
    answer = megu("init", "--images", "photos", "--model", model, "--checkpoint", "mine.pth", "--class", "bee")
    assert answer.code == 0, answer.err
    assert "preflight: " in answer.out
    assert load_config(project / "megu.yaml").data.image_size == side
    assert ("found by trying: where your training script has other values" in answer.out) == (side == 32)
    assert megu("check").code == 0


def test_nothing_is_guessed(megu, project):
    from PIL import Image

    Image.new("RGB", (30, 20)).save(project / "photos" / "train" / "ant" / "odd.png")
    answer = megu("init", "--images", "photos", "--model", made(project, 8), "--class", "bee")
    assert answer.code == 0, answer.err
    assert "data.image_size is for you to say" in answer.out
    assert load_config(project / "megu.yaml").data.image_size is None
    assert "224" not in (project / "megu.yaml").read_text().split("data:")[1].split("model:")[0]


def test_a_hugging_face_model_says_its_size(megu, project):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8, num_labels=3)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(project / "vit")
    answer = megu("init", "--images", "photos", "--model", "hf:vit", "--no-check", "--class", "bee")
    assert answer.code == 0, answer.err
    assert load_config(project / "megu.yaml").data.image_size == 32


def test_an_unlearned_checkpoint_says_what_stays_forgotten(megu, project, finished_folder):
    checkpoint = finished_folder / "run" / "model.safetensors"
    answer = megu("init", "--data", "digits", "--model", "small_cnn", "--checkpoint", checkpoint, "--class", "3")
    assert answer.code == 0, answer.err
    assert "the checkpoint was unlearned before; these stay forgotten: class 8" in answer.out
