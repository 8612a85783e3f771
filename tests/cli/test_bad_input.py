"""Everything a user can get wrong: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import listing, process, refused, write_config
from PIL import Image
from safetensors.torch import load_file, save_file

import megu_cli
from megu_cli.run import writing

SHIPPED = Path(megu_cli.__file__).parent / "mllm" / "ratings" / "digits.json"


def test_no_config(megu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(megu("run"), "no config at megu.yaml", "megu init")
    assert listing(tmp_path) == set()


@pytest.mark.parametrize(
    ("text", "part"), [("a: [1", "is not valid YAML"), ("", "holds no settings"), ("- 1", "settings")]
)
def test_yaml_that_does_not_parse(megu, tmp_path, text, part):
    file = tmp_path / "megu.yaml"
    file.write_text(text)
    refused(megu("run", "-c", file), str(file), part)
    assert listing(tmp_path) == {"megu.yaml"}


def test_unknown_key_names_the_nearest(megu, tmp_path):
    refused(
        megu("run", "-c", write_config(tmp_path, noise={"step": 3})), "noise.step: unknown key; did you mean steps?"
    )
    assert listing(tmp_path) == {"megu.yaml"}


def test_all_faults_are_named_together(megu, tmp_path):
    file = write_config(tmp_path, noise={"steps": 0}, finetun={"epochs": 1}, labels={"mode": "harsh"})
    refused(megu("run", "-c", file), "3 settings are at fault", "noise.steps", "finetun: ", "finetune?", "labels.mode")


@pytest.mark.parametrize(
    ("forget", "part"),
    [
        ({"classes": ["eight"]}, "there is no class 'eight'"),
        ({"classes": [10]}, "there is no class 10"),
        ({"classes": [str(i) for i in range(10)]}, "leaves 0 of 10 classes"),
        ({"classes": [str(i) for i in range(9)]}, "leaves 1 of 10 classes"),
        ({"classes": []}, "the forget set is empty"),
        ({"subclasses": ["8"]}, "coarse-labelled"),
        ({"random": {"count": 4000}}, "asks for 4000 of"),
        ({"random": {"fraction": 0.1, "count": 3}}, "exactly one of fraction, count"),
        ({"classes": ["8"], "random": {"count": 3}}, "exactly one of classes, subclasses, samples, subjects, random"),
        ({}, "exactly one of"),
        ({"samples": "none.csv"}, "none.csv cannot be read"),
    ],
)
def test_forget_requests_that_cannot_be(megu, tmp_path, forget, part):
    refused(megu("run", "-c", write_config(tmp_path, forget=forget)), part)
    assert listing(tmp_path) == {"megu.yaml"}


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("5\n400\n-1\n", ["line 2: 400", "line 3: -1"]),
        ("index\n5\n7\n5\n", ["line 4: 5 stands in line 2 already"]),
        ("train/3\nnowhere.png\n", ["line 2: nowhere.png"]),
        ("", ["the forget set is empty"]),
    ],
)
def test_deletion_lists(megu, tmp_path, lines, parts):
    (tmp_path / "deletion.csv").write_text(lines)
    refused(megu("run", "-c", write_config(tmp_path, forget={"samples": "deletion.csv"})), *parts)
    assert listing(tmp_path) == {"megu.yaml", "deletion.csv"}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def checkpoints(tmp_path: Path, state: dict) -> dict[str, tuple[Path, str]]:
    """Checkpoint files that are at fault, each with what the message says."""
    faults = {}

    def add(name: str, part: str, suffix: str = ".safetensors") -> Path:
        path = tmp_path / f"{name}{suffix}"
        faults[name] = (path, part)
        return path

    add("missing", "no checkpoint at")
    save_file(state, path := add("truncated", "damaged, truncated or no safetensors file"))
    path.write_bytes(path.read_bytes()[:-100])
    torch.save(state, path := add("truncated-pth", "damaged", ".pth"))
    path.write_bytes(path.read_bytes()[:2000])
    add("empty-pth", "damaged", ".pth").touch()
    more = {**state, "head.weight": torch.zeros(11, 64), "head.bias": torch.zeros(11)}
    save_file(more, add("class-too-many", "shape of head.weight: (11, 64) in the file, (10, 64) in the model"))
    save_file({k: v for k, v in state.items() if k != "head.bias"}, add("key-missing", "missing: head.bias"))
    save_file({**state, "tail": torch.zeros(1)}, add("key-too-many", "unexpected: tail"))
    torch.save({"weights": Bomb(tmp_path / "exploded")}, add("bomb", "it was not loaded", ".pth"))
    add("bare-bomb", "it was not loaded", ".pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    save_file(
        {**state, "head.bias": torch.full((10,), float("nan"))}, add("nan", "NaN or infinite weights in head.bias")
    )
    torch.save([1, 2], add("no-dict", "is no plain state dict", ".pth"))
    return faults


def test_checkpoints(megu, finished):
    folder = finished.parent
    state = load_file(folder / "run" / "original.safetensors")
    for name, (path, part) in checkpoints(folder, state).items():
        before = path.read_bytes() if path.exists() else None
        for command in ("run", "labels"):
            answer = megu(command, "-c", finished, "-o", folder / name, "--set", f"model.checkpoint={path}")
            refused(answer, path.name, part)
            assert listing(folder / name) <= set(), name
        assert (path.read_bytes() if path.exists() else None) == before
    assert not (folder / "exploded").exists()


def test_a_checkpoint_that_another_model_made(megu, finished):
    mine = finished.parent / "mine.safetensors"
    shutil.copy(finished.parent / "run" / "original.safetensors", mine)
    setting = f"model.checkpoint={mine}"
    answer = megu("labels", "-c", finished, "--set", "model.name=small_resnet", "--set", setting)
    refused(answer, "does not fit the model", "missing: stem.0.weight", "and ", "model.name is another architecture")


def test_unknown_model(megu, config):
    refused(megu("run", "-c", config, "--set", "model.name=resnet9000"), "there is no model 'resnet9000'")
    refused(megu("run", "-c", config, "--set", "model.name=torchvision:resnet9000"), "no classifier 'resnet9000'")


def test_an_artifact_of_another_data_set_or_checkpoint(megu, finished):
    out = finished.parent / "run"
    answer = megu("finetune", "-c", finished, "--force", "--set", "data.limit=300")
    refused(answer, "stale", "the training data")
    state = load_file(out / "original.safetensors")
    state["head.bias"] += 1
    save_file(state, finished.parent / "other.safetensors")
    answer = megu(
        "noise", "-c", finished, "--force", "--set", f"model.checkpoint={finished.parent / 'other.safetensors'}"
    )
    refused(answer, "labels.safetensors is stale", "the checkpoint")


def test_files_of_the_users_are_never_replaced(megu, finished):
    out = finished.parent / "run"
    state = load_file(out / "original.safetensors")
    mine = finished.parent / "mine" / "original.safetensors"
    mine.parent.mkdir()
    save_file(state, mine)
    before = mine.read_bytes()
    for command in ("run", "train"):
        refused(megu(command, "-c", finished, "-o", mine.parent), "was not written by megu", "model.checkpoint")
    refused(
        megu("run", "-c", finished, "-o", mine.parent, "--set", f"model.checkpoint={mine}"), "lies in the run directory"
    )
    assert mine.read_bytes() == before
    assert listing(mine.parent) == {"original.safetensors"}


def test_an_output_directory_that_cannot_be_written(megu, config, tmp_path):
    (tmp_path / "file").write_text("")
    refused(megu("run", "-c", config, "-o", tmp_path / "file"), "cannot be written", "-o DIR")
    refused(megu("run", "-c", config, "-o", tmp_path / "file" / "below"), "cannot be written", "-o DIR")


def test_a_class_that_the_recorded_ratings_lack(megu, config, tmp_path):
    content = json.loads(SHIPPED.read_text())
    del content["scores"]["8"]["3"]
    (tmp_path / "ratings.json").write_text(json.dumps(content))
    answer = megu("similarity", "-c", config, "--set", f"mllm.ratings={tmp_path / 'ratings.json'}")
    refused(answer, "row '8' has no rating of '3'")
    assert listing(config.parent / "run") == set()


@pytest.mark.parametrize(
    "content", ['{"classes": []}', "[", '{"classes": ["8"], "rater": "x", "scores": {"8": {"3": 11}}}']
)
def test_ratings_that_are_none(megu, config, tmp_path, content):
    (tmp_path / "ratings.json").write_text(content)
    refused(megu("similarity", "-c", config, "--set", f"mllm.ratings={tmp_path / 'ratings.json'}"), "ratings.json")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no such device")
@pytest.mark.parametrize("settings", [
    ("mllm.ratings=/dev/zero",),
    ("forget.classes=null", "forget.samples=/dev/zero"),
    ("model.classes=/dev/zero",),
    ("data.name=manifest", "data.image_size=8", "data.manifest=/dev/zero", f"mllm.ratings={SHIPPED}"),
])  # fmt: skip
def test_a_device_is_no_file(megu, config, settings):
    """It has no end: what reads until the end takes all memory."""
    given = [word for setting in settings for word in ("--set", setting)]
    refused(megu("similarity", "-c", config, "--dry-run", *given), "no regular file")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no such device")
def test_a_device_is_no_config(megu):
    refused(megu("similarity", "-c", "/dev/zero"), "no regular file")


def test_an_image_that_cannot_be_decoded(megu, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog", "eel"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 255, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    bad = tmp_path / "images" / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    file = write_config(tmp_path, data={"name": "imagefolder", "root": "images", "image_size": 8, "limit": None},
                        forget={"classes": ["dog"]})  # fmt: skip
    refused(megu("train", "-c", file), str(bad), "cannot be decoded")
    assert listing(tmp_path / "run") == set()


@pytest.mark.slow
def test_a_second_process_on_the_same_run_directory(megu, finished):
    out = finished.parent / "run"
    with writing.locked(out):
        code = "from megu_cli.cli.app import main; main()"
        other = process("-c", code, "labels", "-c", finished, "--force")
        assert other.returncode == 2
        assert "another megu process is writing to" in other.stderr
        # Looking never waits.
        assert megu("status", "-c", finished).code == 0


@pytest.mark.parametrize("arguments", [["--frob"], ["nonsense"], ["run", "--seed", "x"]])
def test_bad_usage(megu, arguments):
    answer = megu(*arguments)
    assert answer.code == 2
    assert answer.out == ""


def test_bad_overrides_and_requirements(megu, config):
    refused(megu("run", "-c", config, "--set", "noise.steps"), "not of the form key.subkey=value")
    refused(megu("run", "-c", config, "--require", "forget_test_acc=0"), "not of the form name<=number")
    refused(megu("run", "-c", config, "--device", "tpu"), "device")
    assert not (config.parent / "run").exists()


def test_superclasses_that_do_not_fit(megu, tmp_path):
    file = write_config(tmp_path, data={"superclasses": {"low": ["0", "1", "x"], "high": ["1"]}})
    refused(megu("run", "-c", file), "'x' is no class", "'1' is in 2 superclasses", "'2' is in no superclass")


def test_labels_that_need_held_out_images(megu, tmp_path):
    file = write_config(tmp_path, data={"validation": 0.0}, forget={"random": {"count": 20}})
    refused(megu("run", "-c", file), "need held-out images: raise data.validation")
