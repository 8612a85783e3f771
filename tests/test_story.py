"""The user's story: a folder of photos, a model from a script that knows nothing of megu, a list of files to forget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import subprocess_environment
from PIL import Image
from safetensors.torch import load_file

CLASSES = ("harbour", "meadow", "night", "street")
# A training script as it is found in the wild: plain PyTorch and torchvision.
SCRIPT = """
import sys

import torch
from torch import nn
from torchvision import datasets, models, transforms

prepare = transforms.Compose([
    transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor(),
    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])
photos = datasets.ImageFolder("photos", prepare)
model = models.resnet18(num_classes=len(photos.classes))


def accuracy(files=None):
    model.eval()
    chosen = [i for i, (path, _) in enumerate(photos.samples) if files is None or path.removeprefix("photos/") in files]
    with torch.no_grad():
        hits = [model(photos[i][0][None]).argmax().item() == photos[i][1] for i in chosen]
    return sum(hits) / len(hits)


if sys.argv[1] == "train":
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(photos, batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for epoch in range(12):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.save(model.state_dict(), "weights.pth")
else:
    model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
    forgotten = set(open("delete.csv").read().split())
    kept = {path.removeprefix("photos/") for path, _ in photos.samples} - forgotten
    print(accuracy(forgotten), accuracy(kept))
"""


def photos(folder: Path, each: int) -> None:
    """JPEG files: each class is bright in a place of its own; a quarter of them could be of either of two classes."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.normal(110, 30, (40, 48, 3))
            for look in {k, (k + 1) % 4} if i % 4 == 0 else {k}:
                pixels[10 * look : 10 * look + 10, :, look % 3] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"IMG_{i:03}.jpg", quality=90)


def run(folder: Path, *command: object) -> str:
    answer = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=subprocess_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.slow
def test_forty_photos_are_forgotten_by_a_model_that_megu_did_not_make(tmp_path):
    photos(tmp_path / "photos", each=44)
    (tmp_path / "script.py").write_text(SCRIPT)
    run(tmp_path, "script.py", "train")
    # Those that could be of either class: their own training is all that could teach them.
    hard = [f"{name}/IMG_{i:03}.jpg" for name in CLASSES for i in range(0, 44, 4)]
    (tmp_path / "delete.csv").write_text("\n".join(hard[:40]) + "\n")
    scores = {a: {b: 3 + 4 * (abs(CLASSES.index(a) - CLASSES.index(b)) in (1, 3)) for b in CLASSES if b != a}
              for a in CLASSES}  # fmt: skip
    (tmp_path / "ratings.json").write_text(json.dumps({"classes": CLASSES, "rater": "a person", "scores": scores}))

    run(tmp_path, "-m", "megu_cli", "init", "--images", "photos", "--checkpoint", "weights.pth",
        "--samples", "delete.csv")  # fmt: skip
    settings = ["data.image_size=32", "mllm.ratings=ratings.json", "labels.keep=0.3",
                "finetune.retain_fraction=4", "finetune.epochs=3"]  # fmt: skip
    given = [part for setting in settings for part in ("--set", setting)]
    figures = json.loads(run(tmp_path, "-m", "megu_cli", "run", "--json", "-q", *given))
    assert figures["request"]["forget"] == 40

    # The script takes a .pth of tensors, as it wrote one.
    torch.save(load_file(tmp_path / "megu-run" / "model.safetensors"), tmp_path / "unlearned.pth")
    before, kept_before = map(float, run(tmp_path, "script.py", "test", "weights.pth").split())
    after, kept = map(float, run(tmp_path, "script.py", "test", "unlearned.pth").split())
    assert kept_before > 0.95
    assert kept > kept_before - 0.05
    assert after < before - 0.1
