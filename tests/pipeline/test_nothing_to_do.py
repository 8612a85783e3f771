"""A command with nothing to do reads no data and imports no library of tensors; whatever changed is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import process, write_config
from PIL import Image

from megu_cli.config import load_config
from megu_cli.pipeline import remembered
from megu_cli.pipeline.remembered import InputMemory, Unknown, evidence
from megu_cli.run import files

# Runs a command and prints which of the heavy packages it has imported.
SCRIPT = """
import sys
from megu_cli.cli.app import main
sys.argv = ["megu", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    heavy = [name for name in ("torch", "sklearn", "pandas", "torchvision", "transformers") if name in sys.modules]
    print("HEAVY", stop.code or 0, *heavy, file=sys.stderr)
"""


def called(command: str, config: Path, *arguments: object) -> tuple[int, list[str]]:
    """Exit code, and the heavy packages that were imported."""
    # Python puts the working directory before PYTHONPATH: in a clone, its files would hide the installed ones.
    done = process("-c", SCRIPT, command, "-c", config, *arguments, cwd=config.parent)
    line = next(line for line in done.stderr.splitlines() if line.startswith("HEAVY"))
    _, code, *heavy = line.split()
    return int(code), heavy


def test_status_and_a_second_run_import_nothing_heavy(megu, finished):
    assert megu("run", "-c", finished, "--force", "--set", "eval.oracle=true").code == 0  # this copy has no memory yet
    assert (finished.parent / "run" / files.INPUT_DIGESTS).is_file()
    assert called("status", finished) == (0, [])
    assert called("run", finished) == (0, [])
    # Other data have to be read.
    assert "torch" in called("status", finished, "--set", "data.limit=390")[1]


def folder_config(folder: Path) -> Path:
    """A config that names a manifest, a deletion list, ratings and a checkpoint."""
    (folder / "images").mkdir(parents=True)
    rows = ["path,label"]
    for i in range(4):
        Image.new("L", (8, 8), 40 * i).save(folder / "images" / f"{i}.png")
        rows.append(f"images/{i}.png,{'ab'[i % 2]}")
    (folder / "list.csv").write_text("\n".join(rows))
    (folder / "delete.txt").write_text("images/0.png\n")
    (folder / "ratings.json").write_text("{}")
    (folder / "weights.pth").write_bytes(b"weights")
    return write_config(
        folder,
        data={"name": "manifest", "manifest": "list.csv", "image_size": 8, "limit": None},
        model={"checkpoint": "weights.pth"},
        forget={"samples": "delete.txt"},
        mllm={"ratings": "ratings.json"},
    )


@pytest.mark.parametrize(
    "name", ["images/1.png", "list.csv", "delete.txt", "ratings.json", "weights.pth", "run/finetune.json"]
)
def test_every_file_is_evidence(tmp_path, name):
    config = load_config(folder_config(tmp_path))
    before = evidence(config)
    assert evidence(config) == before
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    assert evidence(config) != before


def test_the_same_size_and_time_of_change_are_not_enough(tmp_path):
    config = load_config(folder_config(tmp_path))
    before, path = evidence(config), tmp_path / "images" / "1.png"
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert evidence(config) != before  # its inode changed later


@pytest.mark.parametrize(
    "override",
    ["data.validation=0.2", "model.name=small_resnet", "forget.duplicates=warn", "seed=3", "mllm.image_size=99"],
)
def test_settings_of_inputs_are_evidence_and_others_are_not(config, override):
    before = evidence(load_config(config))
    assert evidence(load_config(config, [override])) != before
    assert evidence(load_config(config, ["finetune.lr=0.01", "train.epochs=1"])) == before


def test_versions_of_packages_are_evidence(config, monkeypatch):
    settings = load_config(config)
    before = evidence(settings)
    real = remembered.version
    monkeypatch.setattr(remembered, "version", lambda name: "0.1" if name == "scikit-learn" else real(name))
    assert evidence(settings) != before


def test_a_manifest_that_is_no_csv_is_left_to_the_command(tmp_path):
    config = load_config(folder_config(tmp_path))
    (tmp_path / "list.csv").write_text("path,label\nimages/0.png,a\r\0images/1.png,b\n", newline="")
    assert InputMemory(config).fact("train_data", lambda: "read") == "read"


def test_a_folder_of_images_is_evidence_with_what_is_added(tmp_path):
    for side in ("train", "test"):
        for label in "ab":
            (tmp_path / "data" / side / label).mkdir(parents=True)
    (tmp_path / "ratings.json").write_text("{}")
    data = {"name": "imagefolder", "root": "data", "image_size": 8, "limit": None}
    file = write_config(tmp_path, data=data, mllm={"ratings": "ratings.json"})
    before = evidence(load_config(file))
    (tmp_path / "data" / "train" / "a" / "new.png").write_bytes(b"")
    assert evidence(load_config(file)) != before
    with pytest.raises(Unknown):  # the run directory changes the folder
        evidence(load_config(file, [f"out={tmp_path / 'data' / 'run'}"]))


@pytest.mark.parametrize("settings", [["model.name=python:mine:net"], ["model.name=hf:someone/model"]])
def test_code_and_hub_ids_are_never_remembered(config, settings):
    with pytest.raises(Unknown):
        evidence(load_config(config, settings))


def test_a_damaged_memory_is_ignored(config):
    settings = load_config(config)
    settings.out.mkdir()
    memory = InputMemory(settings)
    assert memory.fact("train_data", lambda: "right") == "right"
    memory.keep()
    assert InputMemory(settings).fact("train_data", lambda: "read again") == "right"
    content = json.loads(memory.file.read_text())
    content["facts"]["train_data"] = "forged"
    for text in (json.dumps(content), "{", "[]", memory.file.read_text()[:-9]):
        memory.file.write_text(text)
        assert InputMemory(settings).fact("train_data", lambda: "read again") == "read again"


def test_force_reads_the_inputs_again(config):
    settings = load_config(config)
    settings.out.mkdir()
    memory = InputMemory(settings)
    memory.fact("train_data", lambda: "old")
    memory.keep()
    forced = InputMemory(settings)
    forced.forget()
    assert forced.fact("train_data", lambda: "new") == "new"
    forced.keep()
    assert InputMemory(settings).fact("train_data", lambda: "") == "new"
