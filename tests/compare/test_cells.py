"""The cells of a comparison: listed, computed by themselves, and by processes that know of each other."""

from __future__ import annotations

import json
import shutil
import threading

import filelock
import pytest
import yaml
from conftest import write_config

from megu_cli import baselines
from megu_cli.compare import Comparison
from megu_cli.config import changed, load_config
from megu_cli.errors import ConfigError
from megu_cli.pipeline.context import RunContext
from megu_cli.run import artifacts

METHODS = ["original", "retrain", "mask"]


@pytest.fixture
def prepared(finished):
    """The config of a comparison of one seed whose original and oracle are there."""
    settings = yaml.safe_load(finished.read_text())
    finished.write_text(yaml.safe_dump(settings | {"compare": {"methods": METHODS, "seeds": 1}}))
    return finished


def without_times(body):
    """A comparison but for what depends on the clock."""
    if isinstance(body, dict):
        return {k: without_times(v) for k, v in body.items() if k not in ("seconds", "time_ratio")}
    return [without_times(value) for value in body] if isinstance(body, list) else body


def compared(file):
    return json.dumps(without_times(artifacts.read_body(file.parent / "run" / "compare.json")))


def test_each_cell_stands_below_those_that_it_needs(tmp_path, megu):
    variants = {"a-gentle": {"method": "ssd", "alpha": 9.0}, "bare": {"noise.use": "none"}}
    file = write_config(
        tmp_path, compare={"methods": ["retrain", "ssd", "megu"], "variants": variants, "seeds": 2, "tune_seed": 7}
    )
    cells = megu("compare", "-c", file, "--tune", "--list-cells", "--json").json["cells"]
    listed = [cell["id"] for cell in cells]
    for place, cell in enumerate(cells):
        assert {*cell["needs"]} <= {*listed[:place]}, cell
    needs = {cell["id"]: cell["needs"] for cell in cells}
    assert needs["0/retrain"] == ["0/train", "0/oracle", "1/train", "1/oracle"]  # the other seed judges it
    assert needs["tune-7/tune/ssd-3"] == ["tune-7/train"]
    assert needs["1/a-gentle"][-1] == "1/ssd"  # a variant begins with what its method has made
    assert {"ratings", "1/train", "1/oracle", "tune-7/tune/megu-0"} <= {*needs["1/megu"]}
    listed = megu("compare", "-c", file, "--methods", "mask", "--seeds", "1", "--list-cells").out.splitlines()
    assert listed == ["ratings", "0/train", "0/oracle", "0/mask", "0/a-gentle", "0/bare"]
    assert not (tmp_path / "run").exists()


def test_cells_by_themselves_and_a_gathering_give_what_one_run_gives(prepared, tmp_path, megu):
    other = tmp_path / "other" / "megu.yaml"
    shutil.copytree(prepared.parent / "run", other.parent / "run")
    shutil.copy(prepared, other)
    assert megu("compare", "-c", other).code == 0

    called = megu("compare", "-c", prepared, "--cell", "0/mask", "--json")
    assert called.json == {"cell": "0/mask"}
    assert "0/mask: running" in called.err
    seed = prepared.parent / "run" / "compare" / "0"
    assert [path.name for path in seed.iterdir()] == ["mask.json"]
    assert megu("compare", "-c", prepared, "--cell", "0/mask").err.endswith("0/mask: fresh\n")
    assert megu("compare", "-c", prepared, "--cell", "0/original").code == 0
    assert megu("compare", "-c", prepared, "--cell", "0/retrain").code == 0
    assert "running" not in megu("compare", "-c", prepared).err
    assert compared(prepared) == compared(other)


def test_a_cell_that_another_process_computes_is_waited_for(prepared):
    lock = prepared.parent / "run" / "compare" / "0" / ".mask.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()  # a dead process left it
    said, held, found = [], threading.Event(), threading.Event()

    def say(line):
        said.append(line)
        if "waiting" in line:
            found.set()

    def hold():
        with filelock.FileLock(lock):
            held.set()
            found.wait(60)

    comparison = Comparison(RunContext.open(load_config(prepared)), say)
    comparison.run_cell("0/mask")
    assert not any("waiting" in line for line in said)
    assert not lock.exists()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    comparison.run_cell("0/mask")
    holder.join()
    assert said[-2:] == ["0/mask: waiting for the process that computes it", "0/mask: fresh"]


def test_a_cell_that_fails_is_named_and_others_stand(prepared, megu, monkeypatch):
    class Point:
        name, value = "explode", "own:method"

        def load(self):
            def explode(model, task):
                raise RuntimeError("it went wrong")

            return explode

    monkeypatch.setattr(baselines, "entry_points", lambda group: [Point()])
    called = megu("compare", "-c", prepared, "--methods", "mask,explode", "--cell", "0/explode")
    assert called.code == 1
    log = "compare/0-explode.error.txt"
    assert f"error: 0/explode: RuntimeError: it went wrong ({log})" in called.err
    assert "in explode" in (prepared.parent / "run" / log).read_text()
    called = megu("compare", "-c", prepared, "--methods", "mask,explode", "--json")
    assert called.code == 1
    assert list(called.json["failed"]) == ["explode"]
    assert called.json["methods"]["mask"]["seeds"]


def test_the_exit_code_of_a_cell_is_that_of_its_error(prepared, megu, monkeypatch):
    def torn(*given):
        raise ConfigError("it cannot be", "Do otherwise.")

    monkeypatch.setattr("megu_cli.compare.arena.Arena._made", torn)
    called = megu("compare", "-c", prepared, "--cell", "0/mask")
    assert called.code == 2
    assert "error: 0/mask: it cannot be\nDo otherwise." in called.err


def test_names_that_are_no_cells_are_refused(prepared, megu):
    for name in ("0/magic", "0", "../x"):
        called = megu("compare", "-c", prepared, "--cell", name)
        assert called.code == 2
        assert "--list-cells" in called.err
    assert megu("compare", "-c", prepared, "--cell", "0/mask", "--dry-run").code == 2


def test_ratings_that_are_there_are_not_asked_for_again(prepared, monkeypatch):
    def asked(*given):
        raise AssertionError("it was asked again")

    monkeypatch.setattr("megu_cli.pipeline.steps.similarity.similarity", asked)
    config = changed(load_config(prepared), {"compare.methods": ["megu"]})
    Comparison(RunContext.open(config)).run_cell("0/megu")
    run = prepared.parent / "run"
    assert (run / "compare" / "0" / "megu" / "similarity.json").read_bytes() == (run / "similarity.json").read_bytes()
