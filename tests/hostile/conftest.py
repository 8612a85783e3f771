"""What all kinds of hostile input share: a folder of tiny photos and a finished run."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_config
from PIL import Image

from .harness import call

CLASSES = ("cat", "dog", "eel")
PHOTOS = {
    "data": {"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None, "validation": 0.2},
    "model": {"name": "small_cnn"},
    "mllm": {"ratings": "ratings.json"},
    "labels": {"mode": "hard"},
    "train": {"epochs": 1, "batch": 8},
    "finetune": {"epochs": 1, "retain_fraction": 0.5, "batch": 8, "forget_batch": 4},
    "eval": {"attack_samples": 8, "probe_samples": 8},
}


def photo(path: Path, seed: int) -> Path:
    """A photo of 8 x 8 pixels; equal seeds give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


def ratings(file: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Recorded ratings of these classes."""
    scores = {a: {b: float((i + 2 * k) % 10) for k, b in enumerate(classes) if b != a} for i, a in enumerate(classes)}
    file.write_text(json.dumps({"rater": "x", "classes": list(classes), "scores": scores}), encoding="utf-8")
    return file


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    # A promise about power cuts, kept by other tests; here it would take most of the time.
    patch.setattr("os.fsync", lambda descriptor: None)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.setenv(name, "1")
    torch.set_num_threads(1)
    platform.platform()  # starts `uname` once in a process; openai asks for it in its first request
    yield
    patch.undo()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/train/CLASS/*.png, photos/test/CLASS/*.png, ratings.json, delete.csv and megu.yaml."""
    folder = tmp_path_factory.mktemp("hostile")
    seed = 0
    for split in ("train", "test"):
        for name in CLASSES:
            for k in range(5):
                photo(folder / "photos" / split / name / f"{k}.png", seed := seed + 1)
    photo(folder / "secret.png", 999)
    ratings(folder / "ratings.json")
    (folder / "delete.csv").write_text("cat/0.png\ncat/1.png\n")
    write_config(folder, forget={"samples": "delete.csv"}, **PHOTOS)
    return folder


@pytest.fixture(scope="session")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run on the photos, in a directory of its own; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    from megu_cli.config import load_config
    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.engine import Pipeline

    Pipeline(RunContext.open(load_config(photos / "megu.yaml", [], {"out": folder}))).run()
    # What libraries start when they are first used is not what an input starts.
    assert call("report", "-c", photos / "megu.yaml", "-o", folder, user=photos, run=folder, writes=True).code == 0
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the whole suite slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
