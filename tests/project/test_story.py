"""The user's story: a folder of photos, a model from a script that knows nothing of megu, a list of files to forget."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("harbour", "meadow", "night", "street")
# A training script as it is found in the wild: plain PyTorch and torchvision, with a network of its own.
SCRIPT = """
import sys

import torch
from torch import nn
from torchvision import datasets, transforms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )
        self.head = nn.Linear(1024, 4)

    def forward(self, x):
        return self.head(self.body(x))


def photos(folder):
    return datasets.ImageFolder(folder, transforms.Compose([
        transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]))


def accuracy(model, folder, files=None):
    model.eval()
    shown = photos(folder)
    chosen = [i for i, (path, _) in enumerate(shown.samples) if files is None or path.split("/", 2)[2] in files]
    with torch.no_grad():
        hits = [model(shown[i][0][None]).argmax().item() == shown[i][1] for i in chosen]
    return sum(hits) / len(hits)


def train():
    torch.manual_seed(0)
    model = Net()
    loader = torch.utils.data.DataLoader(photos("photos/train"), batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for epoch in range(12):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.save({"epoch": 12, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, "weights.pth")


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train()
    else:
        model = Net()
        model.load_state_dict(torch.load(sys.argv[2], weights_only=True)["state_dict"])
        forgotten = set(open("delete.csv").read().split())
        kept = {path.split("/", 2)[2] for path, _ in photos("photos/train").samples} - forgotten
        print(accuracy(model, "photos/train", forgotten), accuracy(model, "photos/train", kept),
              accuracy(model, "photos/test"))
"""


def photos(folder: Path, each: int, seed: int) -> None:
    """JPEG files that are hard to tell apart: classes differ by faint light in one place of a noisy picture."""
    rng = np.random.default_rng(seed)
    for k, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.normal(110, 40, (40, 48, 3))
            pixels[10 * k : 10 * k + 10, 8:40, k % 3] += rng.normal(8, 8)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"IMG_{i:03}.jpg", quality=90)


@pytest.mark.slow
def test_forty_photos_are_forgotten_by_a_model_that_megu_did_not_make(megu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos" / "train", each=60, seed=0)
    photos(tmp_path / "photos" / "test", each=60, seed=1)
    Path("shop.py").write_text(SCRIPT)
    rng = np.random.default_rng(2)
    files = [f"{name}/IMG_{i:03}.jpg" for name in CLASSES for i in rng.permutation(60)[:10]]
    Path("delete.csv").write_text("\n".join(files) + "\n")
    scores = {a: {b: 3 + 4 * (abs(CLASSES.index(a) - CLASSES.index(b)) in (1, 3)) for b in CLASSES if b != a}
              for a in CLASSES}  # fmt: skip
    Path("ratings.json").write_text(json.dumps({"classes": CLASSES, "rater": "a person", "scores": scores}))

    def script(*arguments: str) -> list[float]:
        monkeypatch.setattr(sys, "argv", ["shop.py", *arguments])
        capsys.readouterr()
        runpy.run_path("shop.py", run_name="__main__")
        return [float(word) for word in capsys.readouterr().out.split()]

    script("train")
    forgotten, kept, unseen = script("test", "weights.pth")
    # It has learned these very files by heart: what it does not know it gets right far less often.
    assert forgotten == kept == 1
    assert unseen < 0.8

    made = megu("init", "--images", "photos", "--model", "python:shop.py:Net", "--checkpoint", "weights.pth",
                "--samples", "delete.csv")  # fmt: skip
    assert made.code == 0, made.err
    settings = ["data.image_size=32", "model.mean=[0.485,0.456,0.406]", "model.std=[0.229,0.224,0.225]",
                "mllm.ratings=ratings.json"]  # fmt: skip
    answer = megu("run", "--json", *(part for setting in settings for part in ("--set", setting)))
    assert answer.code == 0, answer.err
    # The script held no training image out: how the model does on what it has not seen, only the test split can tell.
    assert "120 of 240 test images are held out for validation" in answer.err
    assert "of their labels" not in answer.err
    assert answer.json["request"]["forget"] == 40
    assert "preflight: 100.0% of" in answer.err
    assert "model.pth is the unlearned checkpoint, wrapped as the input is" in answer.err
    assert "left out, since it was learned: optimizer.state" in answer.err

    # The file that was written is one that the script reads.
    after, kept_after, unseen_after = script("test", "megu-run/model.pth")
    assert torch.load("megu-run/model.pth", weights_only=True)["epoch"] == 12
    assert abs(after - unseen) <= 0.15
    assert kept_after > 0.95
    assert unseen_after > unseen - 0.05
