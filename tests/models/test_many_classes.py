"""12,000 classes, as many as species in a collection of photos; and a model with more classes than have images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import refused, write_config
from PIL import Image
from safetensors.torch import load_file

from megu_cli import data
from megu_cli.config import Config, load_config
from megu_cli.errors import CheckpointError
from megu_cli.evaluation import measure
from megu_cli.models.weights import load_state
from megu_cli.request.resolve import resolve

NET = """
from torch import nn


def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 4), nn.ReLU(), nn.Linear(4, classes))
"""


def test_the_probe_looks_at_a_few_of_many_other_classes():
    names, every = [f"species {i}" for i in range(1000)], torch.arange(1000).repeat(2)
    split = data.Split(
        data.MemoryImages(torch.zeros(2000, 1, 2, 2, dtype=torch.uint8)), every, every, [str(i) for i in range(2000)],
        torch.zeros(1, 1, 1), torch.ones(1, 1, 1), "x",
    )  # fmt: skip
    none = torch.empty(0, dtype=torch.int64)
    large = data.Dataset("x", names, names, torch.arange(1000), split, split.view(none), split, none)
    config = Config.model_validate(
        {"data": {"name": "digits"}, "model": {"name": "small_cnn"}, "forget": {"classes": [0]}}
    )
    request = resolve(large, classes=["species 3", "species 7"], seed=0)
    problem = measure.EvaluationProblem(large, request, config.eval, build=lambda purpose: torch.nn.Identity())
    chosen = problem.sample
    probed = set(every[chosen.probed].tolist())
    assert {3, 7} < probed
    assert len(probed) == measure._PROBED_CLASSES + 2
    assert len(chosen.probed) == 2 * len(probed)  # all images of these
    assert set(every[chosen.forgotten_test].tolist()) == {3, 7}


@pytest.mark.slow
def test_a_whole_run_with_12000_classes(megu, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"species {i}" for i in range(12_000)]
    listed = [(name, "train") for name in names] + [("species 3", "train")] * 3
    listed += [(name, "test") for name in (*names[:50], "species 3")]
    (tmp_path / "img").mkdir()
    rows = ["path,label,split"]
    for i, (name, split) in enumerate(listed):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(tmp_path / "img" / f"{i}.bmp")
        rows.append(f"img/{i}.bmp,{name},{split}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "nets.py").write_text(NET)
    scores = {name: int(rng.integers(0, 11)) for name in names if name != "species 3"}
    ratings = {"classes": names, "rater": "a person", "scores": {"species 3": scores}}
    (tmp_path / "ratings.json").write_text(json.dumps(ratings))
    file = tmp_path / "megu.yaml"
    file.write_text(
        yaml.safe_dump({
            "out": "run",
            "data": {"name": "manifest", "manifest": "list.csv", "image_size": 6},
            "model": {"name": "python:nets.py:make"},
            "forget": {"classes": ["species 3"]},
            "mllm": {"ratings": "ratings.json"},
            "train": {"epochs": 1},
            "finetune": {"max_steps": 10},
            "noise": {"steps": 2},
        })
    )  # fmt: skip
    answer = megu("run", "-c", file, "--json")
    assert answer.code == 0, answer.err
    assert (answer.json["request"]["forget"], answer.json["unlearned"]["forget_test_acc"]) == (4, 0)
    assert answer.json["unlearned"]["probe_acc"] is not None
    assert len(answer.json["per_class"]["unlearned"]["train"]) == 12_000
    row = load_file(tmp_path / "run" / "transition.safetensors")["transition"]
    assert row.shape == (1, 12_000)
    assert row.sum().item() == pytest.approx(1, abs=1e-4)
    old, new = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("original", "model"))
    assert new["3.weight"].shape == old["3.weight"].shape == (12_000, 4)
    assert not torch.equal(new["3.weight"], old["3.weight"])


@pytest.fixture(scope="module")
def six_of_a_hundred(tmp_path_factory):
    """A folder with images of six classes, a network with a hundred outputs, and its checkpoint."""
    folder = tmp_path_factory.mktemp("six")
    rng = np.random.default_rng(0)
    names = [f"thing {i}" for i in range(100)]
    for k, (name, place) in enumerate(SIX.items()):
        names[place] = name
        for part, number in (("train", 12), ("test", 6)):
            (folder / "photos" / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 60, (8, 8, 3)) + 190 * np.array([k & 1, k & 2, k & 4], bool)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / part / name / f"{i}.png")
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    (folder / "nets.py").write_text(HUNDRED)
    torch.manual_seed(0)
    made = {}
    exec(HUNDRED, made)
    torch.save({"state_dict": made["make"]().state_dict()}, folder / "weights.pth")
    return folder


SIX = {"ant": 3, "bee": 20, "cat": 41, "dog": 60, "eel": 77, "fox": 99}
HUNDRED = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 100))
"""


def hundred(folder, out, **model):
    """A config for the folder, written into ``out``."""
    return write_config(
        out,
        data={"name": "imagefolder", "root": str(folder / "photos"), "image_size": 8, "limit": None},
        model={"name": f"python:{folder / 'nets.py'}:make", "checkpoint": str(folder / "weights.pth"), **model},
        forget={"classes": ["cat"]},
        labels={"proxy": {"images": 30, "passes": 1, "networks": 1}},
        finetune={"epochs": 1, "retain_fraction": 1, "batch": 16, "forget_batch": 8},
    )


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_model_with_more_outputs_than_the_data_have_classes_is_sent_to_model_classes(
    command, megu, six_of_a_hundred, tmp_path
):
    file = hundred(six_of_a_hundred, tmp_path)
    refused(megu(command, "-c", file), "100 outputs", "6 classes", "Name all 100 classes of the model in model.classes")


def test_weights_of_more_classes_are_sent_to_model_classes():
    one, other = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, k)) for k in (8, 1000))
    with pytest.raises(CheckpointError) as raised:
        load_state(one, other.state_dict(), "weights.pth")
    assert raised.value.hint.startswith("The checkpoint has 1,000 classes, and the data have 8.\n")
    assert "model.classes" in raised.value.hint
    assert "model.name" not in raised.value.hint
    wider = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 8))
    with pytest.raises(CheckpointError) as raised:
        load_state(one, wider.state_dict(), "weights.pth")
    assert "model.name is another architecture" in raised.value.hint


def test_init_takes_the_names_of_the_outputs(megu, six_of_a_hundred, tmp_path):
    answer = megu(
        "init", "-c", tmp_path / "megu.yaml", "--images", six_of_a_hundred / "photos", "--class", "cat", "--no-check",
        "--model", f"python:{six_of_a_hundred / 'nets.py'}:make", "--model-classes", six_of_a_hundred / "names.txt",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert load_config(tmp_path / "megu.yaml").model.classes == six_of_a_hundred / "names.txt"


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"classes": ["cat"]}, "json"),
        ({"random": {"count": 4}}, "json"),
        pytest.param({"random": {"count": 4}}, "html", marks=pytest.mark.slow),
    ],
)
def test_only_classes_with_images_are_shown_and_the_others_are_counted(asked, form, megu, six_of_a_hundred, tmp_path):
    file = hundred(six_of_a_hundred, tmp_path, classes=str(six_of_a_hundred / "names.txt"), preflight=False)
    asked = ("--set", f"forget={json.dumps(asked)}")
    answer = megu("run", "-c", file, "-q", *asked)
    assert answer.code == 0, answer.err
    assert "not measured: 94 classes without test images" in answer.out
    assert megu("report", "-c", file, "--format", form, *asked).code == 0
    if form == "json":
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert ["Classes of the model", "100, of which 6 have images"] in report["facts"]
        sections = {section["id"]: section for section in report["sections"]}
        assert "Not measured: 94 classes without test images." in sections["classes"]["lead"]
        assert "nearest" not in sections["classes"]["lead"]  # nobody rated
        assert {row[0] for row in sections["classes"]["tables"][0]["rows"]} == {*SIX}
        assert {row[0] for row in sections["entanglement"]["tables"][0]["rows"]} <= {*SIX}
