"""`megu compare --jobs`: cells in several processes, which may fail, be killed, or be ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial

import pytest

from megu_cli.compare.cells import Cell, Cells
from megu_cli.compare.jobs import Jobs
from megu_cli.compare.local import LocalWorkers
from megu_cli.errors import MeguError, MLLMError
from megu_cli.execution.runtime import available_cores, silent


def note(folder, name, what=""):
    """Leave a file for each time that a cell runs."""
    number = sum(path.name.startswith(f"{name}@") for path in folder.iterdir())
    (folder / f"{name}@{number}").write_text(json.dumps([os.getpid(), time.monotonic(), *what]))
    return number


def work(folder, name, force):
    if not (folder / f"{name}@0").exists():  # what is there is not done again
        note(folder, name, [os.environ["OMP_NUM_THREADS"]])


def fail(folder, name, force):
    raise RuntimeError("it went wrong")


def give_up(folder, name, force):
    raise MLLMError("the server is not there", "Start it.")


def die(times, folder, name, force):
    if not (folder / f"{name}@{times}").exists() and note(folder, name) < times:
        os.kill(os.getpid(), signal.SIGKILL)


def opened(folder, rows, say):
    """Cells of these names, functions and needs; they are made in each process anew."""
    cells = Cells(folder / "run", say)
    for name, function, needs, common in rows:
        cells.add(Cell(name, partial(function, folder, name), needs, common=common))
    return cells


def ran(folder, rows, number=2):
    """Run the cells in processes; what they left, what failed, and what was said."""
    said = []
    cells = opened(folder, rows, said.append)
    workers = LocalWorkers(cells, partial(opened, folder, rows), said.append, False, number=number)
    Jobs(cells, workers, said.append).run(silent)
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*@*")}, cells.failures, said


def test_a_cell_runs_after_those_it_needs_and_a_failure_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    rows = [("a", work, (), True), ("b", fail, ("a",), False), ("c", work, ("b",), False), ("d", work, ("a",), False)]
    left, failures, said = ran(tmp_path, rows)
    assert failures == {"b": "RuntimeError: it went wrong (compare/b.error.txt)"}
    assert "in fail" in (tmp_path / "run" / "compare" / "b.error.txt").read_text()
    assert said == [f"b: FAILED: {failures['b']}"]
    assert {*left} == {"a@0", "c@0", "d@0"}
    assert left["a@0"][1] < min(left["c@0"][1], left["d@0"][1])
    # The processes share the cores.
    assert {entry[2] for entry in left.values()} == {str(max(1, available_cores() // 2))}


def test_a_killed_process_costs_nothing_but_its_cell(tmp_path):
    rows = [("a", work, (), True), ("b", partial(die, 3), ("a",), False), ("c", work, ("b",), False)]
    left, failures, said = ran(tmp_path, rows)
    assert failures == {}
    assert sorted(left) == ["a@0", "b@0", "b@1", "b@2", "b@3", "c@0"]
    assert len({left[f"b@{number}"][0] for number in range(4)}) == 4
    assert said == ["b: its process was ended from outside (exit code -9); another one takes it up"] * 3


@pytest.mark.slow
def test_a_cell_that_kills_each_process_is_given_up(tmp_path):
    rows = [("a", partial(die, 9), (), False), ("b", work, (), False)]
    left, failures, _ = ran(tmp_path, rows, number=1)
    assert "ended from outside (exit code -9) 4 times" in failures["a"]
    assert "b@0" in left


def test_the_error_of_what_all_need_ends_the_comparison_with_its_exit_code(tmp_path):
    rows = [("ratings", give_up, (), True), ("a", work, ("ratings",), False)]
    with pytest.raises(MLLMError, match="ratings: the server is not there") as error:
        ran(tmp_path, rows, number=1)
    assert error.value.exit_code == 4
    assert error.value.hint == "Start it."
    with pytest.raises(MeguError, match=r"ratings: RuntimeError: it went wrong \(compare/ratings.error.txt\)"):
        ran(tmp_path, [("ratings", fail, (), True)], number=1)
