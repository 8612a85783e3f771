"""A stage that is added is a row of the table and a module in `steps`; everything else reads the table."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megu_cli.pipeline.rehearsal import Estimate
from megu_cli.pipeline.stages import STAGES, Stage
from megu_cli.pipeline.steps.product import Product
from megu_cli.run import artifacts


@pytest.fixture
def extra(monkeypatch):
    """A stage that counts the forgotten images."""
    module = ModuleType("megu_cli.pipeline.steps.extra")
    module.count = lambda context, inputs: Product(artifacts.Artifact({"images": len(context.inputs.request.forget)}))
    module.count_estimate = lambda rehearsal: Estimate(steps=7, seconds=1.5)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    stage = Stage(
        name="extra",
        function="extra:count",
        estimate="extra:count_estimate",
        file="extra.json",
        command="megu run",
        settings=("seed",),
        inputs=("forget",),
        body={"images": int},
        required=("images",),
        traces={"extra.json": "the number of forgotten images"},
        goal=True,
    )
    monkeypatch.setitem(STAGES, "extra", stage)


def test_a_stage_is_a_row_and_a_module(megu, finished, extra):
    file = finished.parent / "run" / "extra.json"

    def status() -> str:
        return megu("status", "-c", finished, "--json").json["stages"]["extra"]["status"]

    assert status() == "missing"
    planned = megu("run", "-c", finished, "--dry-run", "--json").json
    row = next(row for row in planned["plan"] if row["stage"] == "extra")
    assert (row["action"], row["steps"], planned["total"]["seconds"]) == ("run", 7, 1.5)
    assert megu("run", "-c", finished).code == 0
    made = artifacts.read(file)
    assert made.body["images"] > 0
    assert status() == "fresh"

    meta = {key: value for key, value in made.meta.items() if key != "checksum"}
    for body in ({"images": "many"}, {"other": 1}, made.body):
        artifacts.save(file, artifacts.seal(artifacts.Artifact(body), meta))
        assert status() == ("fresh" if body == made.body else "corrupt")
    assert "extra.json" not in megu("purge", "-c", finished, "--dry-run", "--json").json["kept"]
    deleted = megu("purge", "-c", finished, "--yes", "--json").json["deleted"]
    assert deleted["extra.json"] == "the number of forgotten images"
    assert not file.exists()
