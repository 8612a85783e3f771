"""Fixtures: a run on a few digits that takes seconds, and the command line called in process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import megu_cli
from megu_cli.baselines.task import Task
from megu_cli.config import DataConfig
from megu_cli.data import Dataset, MemoryImages, Preprocessing, Split, load

TINY = {
    "out": "run",
    "data": {"name": "digits", "limit": 400, "validation": 0.1},
    "model": {"name": "small_cnn"},
    "forget": {"classes": ["8"]},
    "train": {"epochs": 2, "batch": 32},
    "labels": {"proxy": {"networks": 1, "passes": 2}},
    "noise": {"use": "negative", "steps": 4, "batch": 2},
    "finetune": {"epochs": 1, "retain_fraction": 0.5, "batch": 64, "forget_batch": 16},
    "eval": {"attack_samples": 100, "probe_samples": 200},
}


@pytest.fixture(autouse=True)
def _same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # More threads only get in each other's way at these sizes, and bytes are promised for a given number.
    torch.set_num_threads(1)
    # A user's terminal width, colours or config must not decide a test.
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Called:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Megu = Callable[..., Called]


@pytest.fixture
def megu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Megu:
    """Call the command line in this process: ``megu("run", "-c", file)``."""
    from megu_cli.cli.app import main

    def call(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["megu", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return call


def write_config(folder: Path, **sections: object) -> Path:
    """The tiny config with sections laid over it, as megu.yaml in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(TINY))
    for name, value in sections.items():
        if isinstance(value, dict) and name != "forget":
            config[name] = {**config.get(name, {}), **value}
        else:
            config[name] = value
    file = folder / "megu.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny config in a folder of its own; its run directory is ``run`` beside it."""
    return write_config(tmp_path)


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny config and a complete run with an oracle; not to be changed."""
    torch.set_num_threads(1)
    from megu_cli.config import load_config
    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.engine import Pipeline

    folder = tmp_path_factory.mktemp("finished")
    file = write_config(folder, eval={"oracle": True})
    settings = load_config(file)
    settings.out.mkdir()
    Pipeline(RunContext.open(settings)).run()
    return folder


@pytest.fixture
def finished(finished_folder: Path, tmp_path: Path) -> Path:
    """The config of a complete run, in a copy of its own."""
    for item in finished_folder.iterdir():
        target = tmp_path / item.name
        if item.is_dir():
            shutil.copytree(item, target)
        else:
            shutil.copy2(item, target)
    return tmp_path / "megu.yaml"


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every safetensors file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def listing(folder: Path) -> set[str]:
    """What lies in a folder, but for the lock and the memo of digests."""
    return (
        {p.name for p in folder.iterdir()} - {".lock", ".digests.npy", ".digests.inputs"} if folder.exists() else set()
    )


def subprocess_environment() -> dict[str, str]:
    """The environment for a megu in a process of its own: the same files as in this one, installed or not."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(megu_cli.__file__).parents[1])}


def process(
    *arguments: object, environment: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in a process of its own, in which megu is this one."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**subprocess_environment(), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def data_set(name: str, prepare=None, channels=None, order=None, reserved=None, **settings) -> Dataset:
    """A data set by its name and other settings of the section ``data``."""
    config = DataConfig(name=name, **settings)
    return load(config, prepare or Preprocessing(), channels=channels, order=order, reserved=reserved)


def _split(labels: torch.Tensor, draw: torch.Generator) -> Split:
    # Each class has a bright pixel of its own among noise.
    pixels = torch.randint(0, 60, (len(labels), 1, 4, 4), generator=draw)
    pixels[torch.arange(len(labels)), 0, labels, labels] = 250
    names = [str(i) for i in range(len(labels))]
    mean, std = torch.full((1, 1, 1), 0.2), torch.full((1, 1, 1), 0.25)
    return Split(MemoryImages(pixels.byte()), labels, labels, names, mean, std, "toy")


@pytest.fixture
def toy() -> Dataset:
    """Three classes of 4x4 images that a linear model can tell apart."""
    draw = torch.Generator().manual_seed(0)
    train, test = (_split(torch.arange(size) % 3, draw) for size in (60, 30))
    names, none = ["a", "b", "c"], torch.empty(0, dtype=torch.int64)
    data = Dataset("toy", names, names, torch.arange(3), train, train.view(none), test, none)
    return data.withholding(torch.arange(54, 60))


@pytest.fixture
def linear() -> nn.Module:
    """A linear classifier of the toy images, at its initialisation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def network() -> nn.Module:
    """A small network with convolution, batch norm and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(96, 3),
    )  # fmt: skip


@pytest.fixture
def task(toy: Dataset) -> Task:
    """Forget class 0 of the toy."""

    def fresh(purpose: str) -> nn.Module:
        torch.manual_seed(len(purpose))
        return network()

    kept = (toy.train.labels != 0) & toy.trainable
    return Task(
        split=toy.train,
        retain=torch.where(kept)[0],
        forget=torch.where(toy.train.labels == 0)[0],
        validation=toy.held_out.view(torch.where(toy.held_out.labels != 0)[0]),
        forgotten=[0],
        classes=3,
        fresh=fresh,
        samples=72,
        batch=12,
        forget_batch=6,
    )


@pytest.fixture
def trained(task: Task) -> nn.Module:
    """A network that knows all three toy classes."""
    torch.manual_seed(1)
    model = network()
    everything = torch.cat([task.retain, task.forget])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = next(task.split.batches([everything])), task.split.labels[everything]
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def refused(answer: Called, *parts: str) -> None:
    """See that a call was refused as input at fault, in words that have these parts."""
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert "\nerror: " in f"\n{answer.err}"
    assert "Traceback" not in answer.err
    for part in parts:
        assert part in answer.err


def write_folder(root: Path, classes=("cat", "dog", "eel"), number: int = 5) -> None:
    """Write ``train`` and ``test`` with a folder of PNGs for each class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
