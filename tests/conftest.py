"""Fixtures: a run on a few digits that takes seconds, and the command line called in process."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

TINY = {
    "out": "run",
    "data": {"name": "digits", "limit": 400, "validation": 0.1},
    "model": {"name": "small_cnn"},
    "forget": {"classes": ["8"]},
    "train": {"epochs": 2, "batch": 32},
    "noise": {"steps": 4, "batch": 2},
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
    from megu_cli.pipeline import Pipeline
    from megu_cli.workspace import Workspace

    folder = tmp_path_factory.mktemp("finished")
    file = write_config(folder, eval={"oracle": True})
    settings = load_config(file)
    settings.out.mkdir()
    Pipeline(Workspace(settings)).run()
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
    return {p.name for p in folder.iterdir()} - {".lock", ".digests.json"} if folder.exists() else set()


def subprocess_environment() -> dict[str, str]:
    """The environment for a megu in a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
