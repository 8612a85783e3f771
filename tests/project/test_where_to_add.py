"""docs/architecture.md, "Where to add what": each of six things is added to a copy of megu by the two files named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import process, write_config

import megu_cli

DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"
# What is added -> the table's file and first line, the row, and the file of the code.
ADDED = {
    "a stage": (
        ("pipeline/stages.py", "_ROWS = ("),
        'Stage("count", "count:count", "count:count_estimate", "count.json", "megu run", ("seed",), ("forget",), '
        '{"images": int}, goal=True, traces={"count.json": "a number"}),',
        "pipeline/steps/count.py",
        """
from megu_cli.pipeline.rehearsal import Estimate
from megu_cli.pipeline.steps.product import Product
from megu_cli.run.artifacts import Artifact
def count(context, inputs):
    return Product(Artifact({"images": len(context.inputs.request.forget)}))
def count_estimate(rehearsal):
    return Estimate(steps=3)
""",
    ),
    "a metric": (
        ("evaluation/catalogue.py", "BUILT_IN = ("),
        'Metric("forgotten", "forgotten images", "figures:forgotten", unit="number", target=None),',
        "evaluation/figures.py",
        """
def forgotten(m):
    return float(len(m.problem.request.forget))
""",
    ),
    "a baseline": (
        ("baselines/__init__.py", "    for method in ("),
        '_builtin("nothing"),',
        "baselines/nothing.py",
        """
def nothing(model, task):
    pass
""",
    ),
    "a rater": (
        ("config/raters.py", "_ROWS = ("),
        'RaterKind("order", "order:Order", "by position", asks=False, settings=("mllm.dtype",)),',
        "mllm/order.py",
        """
from megu_cli.mllm.base import Cost, Ratings
class Order:
    @classmethod
    def of(cls, setup):
        return cls()
    def cost(self, questions):
        return Cost(answered=len(questions))
    def rate(self, questions):
        rows = {q.concept: {name: float(i) for i, name in enumerate(q.candidates)} for q in questions}
        return Ratings("order", rows, {})
""",
    ),
    "a data set": (
        ("config/datasets.py", "_ROWS = ("),
        'DataSource("copied", "builtin:copied", ((0.3,), (0.4,)), _of_sklearn),',
        "data/builtin.py",
        """
def copied(root):
    return digits(root)
""",
    ),
    "a model source": (
        ("config/model_sources.py", "_ROWS = ("),
        'ModelSource("linear:", "linear:WIDTH", "linear:Linear"),',
        "models/linear.py",
        """
from torch import nn
from megu_cli.models.architecture import Architecture
class Linear(Architecture):
    def build(self, classes, channels):
        width = int(self.name)
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, width), nn.ReLU(), nn.Linear(width, classes))
""",
    ),
}


def test_the_table_names_these_files_and_no_others():
    rows = dict(re.findall(r"^\| (an? [^|]+?) \| (.*) \|$", DOCS.read_text(), re.MULTILINE))
    for name, ((table, _), _, code, _) in ADDED.items():
        named = {path.rstrip("/") for path in re.findall(r"`megu_cli/([^`]+)`", rows[name])}
        assert table in named, name
        assert {code, str(Path(code).parent)} & named, name
        assert all((Path(megu_cli.__file__).parent / path).exists() for path in named), name


@pytest.mark.slow
def test_two_files_are_enough(tmp_path):
    package = tmp_path / "copy" / "megu_cli"
    shutil.copytree(Path(megu_cli.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for (table, opening), row, code, text in ADDED.values():
        file = package / table
        assert f"\n{opening}\n" in file.read_text()
        file.write_text(file.read_text().replace(f"\n{opening}\n", f"\n{opening}\n{row}\n", 1))
        with (package / code).open("a") as stream:
            stream.write(text)
    config = write_config(
        tmp_path,
        data={"name": "copied"},
        model={"name": "linear:16"},
        mllm={"backend": "order"},
        compare={"methods": ["nothing"], "seeds": 1},
    )

    def called(*arguments: object) -> dict:
        environment = {"PYTHONPATH": str(package.parent)}
        done = process(
            "-m", "megu_cli", *arguments, "-c", config, "--json", cwd=package.parent, environment=environment
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    steps = {row["stage"]: row["steps"] for row in called("run", "--dry-run")["plan"]}
    assert steps["count"] == 3
    called("run")
    run = tmp_path / "run"
    images = json.loads((run / "count.json").read_text())["images"]
    assert json.loads((run / "eval.json").read_text())["unlearned"]["forgotten"] == images
    assert json.loads((run / "similarity.json").read_text())["rater"] == "order"
    assert {state["status"] for state in called("status")["stages"].values()} == {"fresh"}
    called("compare")
    assert "nothing" in (run / "compare.json").read_text()
    assert "count.json" in called("purge", "--dry-run")["deleted"]
