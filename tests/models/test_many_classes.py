"""12,000 classes: as many as species in a collection of photos."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from megu_cli import data
from megu_cli.config import Config
from megu_cli.evaluation import measure
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
