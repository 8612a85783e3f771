"""The scripts in benchmarks/: cells are whole configs, originals are shared, a partial file says what is missing."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import subprocess_environment, write_config

from megu_cli.config import load_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import benchmark  # noqa: E402

CONFIGS = sorted(BENCHMARKS.glob("*/*.yaml"))
METHODS = ["original", "retrain", "megu", "mask", "finetune"]


def cells(out: Path, **changes: object) -> dict[str, benchmark.Cell]:
    given = {"configs": BENCHMARKS / "fashion_mnist", "out": out, "small": False, "limit": None, "seeds": None,
             "first_seed": 300, "methods": None, **changes}  # fmt: skip
    return {cell.name: cell for cell in benchmark.load(argparse.Namespace(**given))}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_config_of_a_cell_is_valid_and_tuned_on_a_seed_of_its_own(file):
    config = load_config(file)
    assert config.compare.tune_seed is not None
    assert config.compare.tune_seed not in range(config.seed, config.seed + config.compare.seeds)
    # Seeds that had a part in the choice of the defaults (docs/decisions.md).
    assert not {0, 1, 2, 100, 201, 202, 203} & set(range(config.seed, config.seed + config.compare.seeds))
    assert file.stem in file.read_text()


def test_the_requests_and_sizes_of_the_benchmark(tmp_path):
    found = cells(tmp_path)
    assert len(found) == 8
    large = {name for name, cell in found.items() if cell.config.data.limit is None}
    assert large == {"shirt", "shirt-within-tops", "random-3"}
    for name, cell in found.items():
        assert cell.seeds == list(range(300, 303 if name in large else 305))
        assert min(cell.config.data.limit or 60_000, cell.config.compare.tune_limit) == 10_000
    assert {cell.config.data.limit for cell in cells(tmp_path, small=True).values()} == {10_000}
    small = cells(tmp_path, limit=500, seeds=2, first_seed=400)["shirt"]
    assert (small.seeds, small.config.data.limit) == ([400, 401], 500)


def test_cells_on_the_same_images_share_their_originals(tmp_path):
    found = cells(tmp_path)

    def originals(name):
        cell = found[name]
        return {benchmark.original_folder(cell, limit, seed, tmp_path) for limit, seed in cell.originals().values()}

    assert originals("shirt") == originals("random-3")
    assert len(originals("shirt")) == 4
    assert originals("ankle-boot") == originals("random-1")
    assert len(originals("ankle-boot")) == 6
    assert len(originals("shirt") & originals("ankle-boot")) == 1  # of the seed that settings are chosen on
    assert not originals("shirt") & originals("shirt-within-tops")  # four classes instead of ten


def test_a_file_without_any_cell_says_that_all_are_missing(tmp_path):
    found = cells(tmp_path)
    benchmark.collect(list(found.values()), tmp_path / "benchmark.json")
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(result["missing"]) == set(found)
    assert result["cells"] == {}


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "benchmark.py", "--configs", folder, "--out", folder / "out", *arguments]
    return subprocess.run(
        [str(word) for word in command], env=subprocess_environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_killed_or_not_a_second_run_computes_only_what_is_missing(tmp_path):
    compare = {"methods": METHODS, "seeds": 2, "tune_limit": 200, "tune_seed": 9}
    for name, forget in (("whole", {"classes": ["8"]}), ("few", {"random": {"fraction": 0.1}})):
        write_config(tmp_path / name, forget=forget, compare=compare, eval={"relearn_epochs": 2})
        (tmp_path / name / "megu.yaml").rename(tmp_path / f"{name}.yaml")
    first = run(tmp_path, "--only", "whole")
    assert first.returncode == 0, first.stdout + first.stderr
    file = tmp_path / "out" / "benchmark.json"
    result = json.loads(file.read_text())
    assert set(result["missing"]) == {"few"}
    cell = result["cells"]["whole"]
    assert cell["seeds"] == [300, 301]
    assert cell["tuning"] == {"seed": 9, "images": 200}
    assert set(cell["methods"]) == set(METHODS)
    assert cell["wall_seconds"] > 0
    assert "per_class" not in cell["methods"]["megu"]["seeds"]["300"]

    # The originals are there already.
    second = run(tmp_path, "--jobs", 2)
    assert second.returncode == 0, second.stdout + second.stderr
    log = (tmp_path / "out" / "few-400" / "benchmark.log").read_text()
    assert "300/oracle: running" in log
    assert "/train: running" not in log
    result = json.loads(file.read_text())
    assert result["missing"] == {}
    assert result["cells"]["whole"] == cell

    logs = {path: path.stat().st_size for path in tmp_path.rglob("benchmark.log")}
    assert len(logs) == 5
    third = run(tmp_path)
    assert third.returncode == 0, third.stdout + third.stderr
    assert json.loads(file.read_text()) == result
    for path, size in logs.items():
        said = path.read_text()[size:]
        assert ": running" not in said
        assert "tuning with" not in said

    # Figures of other methods or seeds than a full run's are not taken for it.
    few = run(tmp_path, "--collect", "--seeds", 3)
    assert few.returncode == 0
    assert set(json.loads(file.read_text())["missing"]) == {"whole", "few"}
