"""The scripts in benchmarks/: cells are whole configs, originals are shared, a partial file says what is missing."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import subprocess_environment, write_config
from scipy import stats

from megu_cli.config import changed, load_config
from megu_cli.errors import MeguError
from megu_cli.mllm.recorded import Recorded

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import ablations  # noqa: E402
import benchmark  # noqa: E402
import cost  # noqa: E402
import speed  # noqa: E402
import tables  # noqa: E402

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
    # Seeds that had a part in the choice of the defaults (benchmarks/lab.md).
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


def method(**figures: list[float | None]) -> dict:
    """A method of benchmark.json with a figure per seed; what only the oracle is compared in is left out."""
    seeds = {}
    for place in range(3):
        row = {name: values[place] for name, values in figures.items()}
        compared = {name: row.pop(name) for name in ("avg_gap", "js_divergence") if name in row}
        seeds[str(300 + place)] = {
            "metrics": row,
            "comparison": compared,
            "entanglement": {},
            "seconds": None,
            "time_ratio": None,
        }
    means = {n: None if None in v else sum(v) / 3 for n, v in figures.items()}
    return {"mean": means, "interval": dict.fromkeys(means), "seeds": seeds, "settings": {"lr": 0.1}, "paired": {}}


@pytest.fixture
def result() -> dict:
    """A benchmark of one request in which `near` wins in JS, `far` in the probe."""
    methods = {
        "original": method(js_divergence=[0.6] * 3, probe_acc=[0.9] * 3, retain_train_acc=[1.0] * 3,
                           retain_test_acc=[0.9] * 3, relearn_epochs=[0, 0, 0]),
        "retrain": method(js_divergence=[0.1] * 3, probe_acc=[0.5, 0.6, 0.7], relearn_epochs=[4, 4, 4]),
        "megu": method(js_divergence=[0.2, 0.3, 0.4], probe_acc=[0.6, 0.7, 0.8], relearn_epochs=[2, 2, 2]),
        "near": method(js_divergence=[0.11, 0.2, 0.3], probe_acc=[0.9] * 3, relearn_epochs=[2, None, 2]),
        "far": method(js_divergence=[0.5] * 3, probe_acc=[0.5, 0.6, 0.69], relearn_epochs=[9, 9, 9]),
    }  # fmt: skip
    methods["near"]["paired"] = {"js_divergence": {"mean": -0.1, "interval": 0.01, "seeds": 3},
                                 "probe_acc": {"mean": 0.2, "interval": 0.3, "seeds": 3}}  # fmt: skip
    methods["far"]["paired"] = {"js_divergence": {"mean": 0.2, "interval": 0.1, "seeds": 3}}
    cell = {
        "config": {"data.name": "digits", "model.name": "small_cnn", "data.superclasses": None},
        "request": {"kind": "classes", "classes": ["8"], "concepts": ["8"], "forget": 40, "retain": 360},
        "wall_seconds": 90.0,
        "seeds": [300, 301, 302],
        "tuning": {"seed": 9, "images": 200},
        "tuned": {"near": [{"settings": {"lr": 0.1}, "score": 0.9}]},
        "failed": {"scrub": {"301": "it went wrong"}},
        "noise_floor": 0.005,
        "methods": methods,
    }
    return {"machine": "a machine", "versions": {"torch": "2"}, "missing": {"other": "not there"},
            "cells": {"whole": cell}}  # fmt: skip


def test_tables_show_the_best_the_losses_and_what_is_missing(result, tmp_path):
    blocks = tables.of_benchmark(result, tmp_path)
    rows = {line.split("`")[1]: line for line in blocks["whole"].splitlines() if line.startswith("| `")}
    assert set(rows) == {"original", "retrain", "megu", "near", "far"}
    assert "**0.203**" in rows["near"]
    assert "**59.7**" in rows["far"]
    assert "**" not in rows["original"] + rows["retrain"]
    assert "never (1 of 3)" in rows["near"]
    assert "lr 0.1" in rows["near"]
    assert "generalisation gap of 10.0 points" in blocks["whole"]
    assert "Noise floor of the gap: 0.5" in blocks["whole"]
    assert "scrub, seed 301: it went wrong" in blocks["whole"]
    said = next(line for line in blocks["whole"].splitlines() if line.startswith("- JS"))
    assert said == "- JS: better than far (+0.200 ± 0.100); **worse than** near (−0.100 ± 0.010)."
    assert "no different from near (+20.0 ± 30.0)" in blocks["whole"]
    assert "**Missing:** other: not there." in blocks["machine"]
    assert "0.300 / 0.203 (near) / 0.100" in blocks["summary"]
    assert "`near`" in blocks["residue"]
    assert (tmp_path / "figures" / "methods.svg").read_text().count("near") == 1


def test_single_images_have_no_probe_and_are_drawn_by_the_loss_attack(result, tmp_path):
    cell = result["cells"]["whole"]
    cell["request"]["kind"] = "random"
    for own in cell["methods"].values():
        for figures in (own["mean"], own["interval"], own.get("paired", {})):
            figures.pop("probe_acc", None)
        for seed in own["seeds"].values():
            seed["metrics"]["mia_loss_auc"] = 0.6
            seed["metrics"].pop("probe_acc", None)
    blocks = tables.of_benchmark(result, tmp_path)
    assert "probe" not in blocks["whole"] + blocks["residue"]
    assert "loss AUC" in blocks["whole"]
    assert (tmp_path / "figures" / "methods.svg").read_text().count("near") == 1


def test_what_a_paired_difference_says():
    said = [tables.verdict({"mean": mean, "interval": 0.1}) for mean in (0.2, 0.05, 0.0, -0.2)]
    assert said == ["better", "same", "same", "worse"]
    assert tables.verdict({"mean": 0.0, "interval": 0.0}) == "same"
    assert tables.verdict({"mean": 1e-17, "interval": 0.0}) == "same"
    assert tables.verdict({"mean": 9.0, "interval": None}) == tables.verdict(None) == "unknown"


def test_blocks_are_filled_in_between_their_marks_and_the_rest_of_the_page_stays():
    page = "# Title\n\n<!-- a -->\nold\n<!-- /a -->\n\nwords\n"
    once = tables.filled(page, {"a": "new \\1", "b": "more"})
    assert "old" not in once
    assert "<!-- a -->\nnew \\1\n<!-- /a -->\n\nwords" in once
    assert once.endswith("<!-- b -->\nmore\n<!-- /b -->\n")
    assert tables.filled(once, {"a": "new \\1", "b": "more"}) == once


@pytest.mark.parametrize("name", list(ablations.REQUESTS))
def test_every_setting_of_the_ablations_is_one(name, tmp_path):
    arguments = argparse.Namespace(first_seed=320, out=tmp_path, limit=10_000)
    config = ablations.configured(name, arguments)
    found = ablations.settings(config, ablations.GRIDS[name], None)
    assert next(iter(found)) == ablations.DEFAULT
    for changes in found.values():
        assert len(changes) <= 1
        other = changed(config, {key: Path(v) if key == "mllm.ratings" else v for key, v in changes.items()})
        assert (other != config) == bool(changes)
    assert set(ablations.settings(config, ablations.GRIDS[name], ["labels.source"])) == {
        ablations.DEFAULT,
        *(f"labels.source={s}" for s in ("transition+prediction", "transition", "prediction", "random")),
    }  # fmt: skip


@pytest.mark.slow
def test_ablations_are_kept_and_drawn(tmp_path, monkeypatch, capsys):
    file = write_config(tmp_path, seed=320, mllm={"backend": "recorded"}, noise={"use": "auto"})
    monkeypatch.setattr(ablations, "configured", lambda name, arguments: load_config(file))
    words = ["--only", "coat", "--keys", "mllm.ratings", "noise.use", "--seeds", "2", "--out", str(tmp_path / "out")]
    ablations.main(words)
    result = json.loads((tmp_path / "out" / "ablations.json").read_text())
    found = result["requests"]["coat"]
    varied = [*(f"noise.use={use}" for use in ("both", "positive", "negative")),
              *(f"mllm.ratings={kind}" for kind in ablations.RATINGS)]  # fmt: skip
    assert list(found["settings"]) == ["default", *varied]
    seeds = found["settings"]["noise.use=negative"]["seeds"]
    apart = [[rows[seed]["js_divergence"] for seed in ("320", "321")] for rows in
             (seeds, found["settings"]["default"]["seeds"])]  # fmt: skip
    pair = found["settings"]["noise.use=negative"]["from_default"]["js_divergence"]
    low, high = stats.ttest_rel(*apart).confidence_interval(0.95)
    # All figures are kept with five significant digits.
    assert [pair["mean"] - pair["interval"], pair["mean"] + pair["interval"]] == pytest.approx([low, high], abs=2e-5)

    # Labels do not depend on the noise: those of the default were handed over, and none were made anew.
    folder = tmp_path / "run" / "compare" / "321"
    assert (folder / "default" / "labels.safetensors").read_bytes() == (
        folder / "noise.use=both" / "labels.safetensors"
    ).read_bytes()
    assert (folder / "noise.use=both" / "runs.jsonl").read_text().count('"stage": "labels"') == 1
    raters = {kind: Recorded(folder / f"ratings-{kind}.json").rater for kind in ablations.RATINGS}
    assert len(set(raters.values())) == 3
    assert raters["shuffled"].endswith("each row shuffled (seed 321)")
    scores = Recorded(folder / "ratings-confusions.json").scores["8"]
    assert (min(scores.values()), max(scores.values())) == (0, 10)

    capsys.readouterr()
    ablations.main(words)
    again = json.loads((tmp_path / "out" / "ablations.json").read_text())["requests"]["coat"]
    assert again["settings"] == found["settings"]
    assert ": running" not in capsys.readouterr().out

    tables.main(["none.json", str(tmp_path / "out" / "ablations.json"), "--out", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| `noise.use=negative` |" in page
    assert (tmp_path / "docs" / "figures" / "ablations-coat.svg").exists()


def test_the_line_through_measured_times_and_what_is_said_of_them(tmp_path):
    seconds = {100: [3.0, 2.0, 9.0], 200: [5.0], 400: [9.0, 9.0]}
    assert speed.slope(seconds) == pytest.approx((1.0, 0.02))
    overhead = {name: {"overhead": [2.0, 1.0, 4.0]} for name in ("labels", "noise", "finetune")}
    result = {"loop": {"median": 0.954}, "overhead": overhead, "noise": seconds, "finetune": seconds, "share": None}
    result |= {"bare_process": [1.0, 1.5, 9.0], "machine": "a machine", "threads": 1, "versions": {"torch": "2.14"}}
    result["sizes"] = {"repeat": 3}
    assert "95.4% of a bare loop's" in speed.told(result)
    assert "labels: 2.0 s beside" in speed.told(result)
    assert "nothing else: 1.5 s" in tables.of_speed(result)
    assert "a machine, 1 thread; torch 2.14; medians of 3." in tables.of_speed(result)
    speed.draw(result, tmp_path / "a.svg")
    speed.draw(result, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_share_of_retraining_is_that_of_a_run_with_an_oracle(finished):
    run = finished.parent / "run"
    share = speed.share(run)
    assert share["time_ratio"] == pytest.approx(
        (share["labels_s"] + share["noise_s"] + share["finetune_s"]) / share["oracle_s"]
    )
    with pytest.raises(MeguError):
        speed.share(run.parent)


def test_the_table_of_large_data_is_what_the_defaults_give():
    page = cost.PAGE.read_text(encoding="utf-8")
    assert cost.table() in page
    found = cost.counts(cost.CASES[0])
    assert found["steps"] == 94 and found["learned"] == 12_000 + 94 * 64
