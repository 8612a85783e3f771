"""Data larger than memory: what a run takes does not grow with the number of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import process, write_config
from PIL import Image

CLASSES = ("ant", "bee", "cat", "dog", "eel")
# One command in a process of its own, and the most memory that it had in its hands, in KiB.
MEASURED = """
import resource, sys
from megu_cli.cli.app import main
sys.argv = ["megu", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def folder_of(root: Path, number: int) -> None:
    """``number`` images of 8x8 pixels, each another one, all in train/ but a tenth."""
    blank = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    blank.save(root / "blank.bmp")
    head = (root / "blank.bmp").read_bytes()[:-192]
    rng = np.random.default_rng(0)
    for split, share in (("train", 0.9), ("test", 0.1)):
        for k, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(round(number * share / len(CLASSES))):
                pixels = rng.integers(0, 60, 192, dtype=np.uint8)
                pixels[k * 30 : k * 30 + 30] += 150
                (folder / f"{i:06}.bmp").write_bytes(head + pixels.tobytes())


def ratings(file: Path) -> Path:
    """Every class resembles every other one alike."""
    scores = {a: {b: 5 for b in CLASSES if b != a} for a in CLASSES}
    file.write_text(json.dumps({"classes": list(CLASSES), "rater": "nobody", "scores": scores}))
    return file


def peak(folder: Path, number: int, workers: int = 0) -> int:
    """Peak memory in KiB of labels, noise, finetuning and evaluation on so many streamed images."""
    images = folder / "images"
    images.mkdir(parents=True)
    folder_of(images, number)
    file = write_config(
        folder,
        data={"name": "imagefolder", "root": "images", "image_size": 8, "limit": None, "memory_limit": 1e-6,
              "workers": workers, "validation_from": "test"},
        # As many forgotten and finetuned samples in both: the data set alone is larger.
        forget={"random": {"count": 100}},
        finetune={"retain_fraction": "auto", "epochs": 1},
        train={"epochs": 1, "batch": 128},
        noise={"use": "both"},
        mllm={"ratings": str(ratings(folder / "ratings.json"))},
        eval={"attack_samples": 500, "probe_samples": 1000, "batch": 200},
    )  # fmt: skip
    most = 0
    for command in ("train", "run"):
        answer = process("-c", MEASURED, command, "-c", file, "-q")
        assert answer.returncode == 0, answer.stderr
        most = int(answer.stdout.splitlines()[-1])
    assert (folder / "run" / "eval.json").is_file()
    return most


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    few, many = peak(tmp_path / "few", 2_000), peak(tmp_path / "many", 20_000)
    # Measured once by hand with 10,000 and 100,000: see docs/data.md.
    assert many <= 1.1 * few, f"{few / 1024:.0f} MiB with 2,000 images, {many / 1024:.0f} MiB with 20,000"


@pytest.mark.slow
def test_workers_change_no_byte_of_the_result(tmp_path):
    for name, workers in (("alone", 0), ("two", 2)):
        peak(tmp_path / name, 300, workers)
    one, other = (tmp_path / name / "run" / "model.safetensors" for name in ("alone", "two"))
    assert one.read_bytes() == other.read_bytes()
