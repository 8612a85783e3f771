"""`megu compare --cluster local`: cells in tasks of submitit, which may fail, be killed, or be cancelled by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import refused, subprocess_environment, write_config
from joblib.externals import loky
from test_cells import compared
from test_jobs import die, fail, opened, work
from test_jobs_killed import COMPARE, gone, soon

from megu_cli.compare.cluster import ClusterWorkers
from megu_cli.compare.jobs import Jobs
from megu_cli.execution.runtime import silent
from megu_cli.run import writing

submitit = pytest.importorskip("submitit")


def test_without_submitit_the_extra_is_named(megu, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused(megu("compare", "-c", config, "--cluster", "local"), "pip install 'megu-cli[cluster]'")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cluster-option", "timeout_min=3"), "--cluster-option is for --cluster"),
        (
            ("--cluster", "local", "--cluster-option", "timeout_min"),
            "'timeout_min' is not of the form key=value",
        ),
        (("--cluster", "local", "--cluster-option", "slurm_partitoin=a"), "Unknown argument 'partitoin'"),
        (("--cluster", "local", "--cluster-option", "mem_gb=much"), 'Parameter "mem_gb" expected type'),
        *(
            (("--cluster", "local", "--cluster-option", option), f"--cluster-option {said}")
            for option, said in {
                "timeout_min=soon": "timeout_min: 'soon' is not a whole number of minutes above 0",
                "timeout_min=-1": "timeout_min: -1 is not a whole number of minutes above 0",
                "slurm_cpus_per_task=all": "slurm_cpus_per_task: 'all' is not a whole number of cores",
                "slurm_setup=module load cuda": "slurm_setup: 'module load cuda' is not a list of shell lines",
                "slurm_additional_parameters=abc": "slurm_additional_parameters: 'abc' is not a mapping",
            }.items()
        ),
        (("--cluster", "cloud"), "--cluster cloud: "),
    ],
)
def test_clusters_and_options_that_are_not_there_are_refused(megu, config, options, said):
    refused(megu("compare", "-c", config, *options), said)
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, "1"),
        ({"cpus_per_task": 4}, "4"),
        ({"slurm_cpus_per_task": 8}, "8"),
        ({"cpus_per_task": 4, "slurm_cpus_per_task": 8}, "8"),
        ({"cpus_per_task": 4, "local_cpus_per_task": 8}, "4"),
    ],
)
def test_a_task_has_as_many_threads_as_cores(tmp_path, monkeypatch, options, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # restored at the end
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", staticmethod(lambda: 1))  # as where Slurm is installed
    workers = ClusterWorkers(opened(tmp_path, [], print), print, print, False, cluster="slurm", options=options)
    workers.close()
    assert os.environ["OMP_NUM_THREADS"] == threads
    assert workers._executor._executor.parameters.get("cpus_per_task", 1) == int(threads)


def test_on_this_machine_there_is_a_task_for_each_core_that_the_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(loky, "cpu_count", lambda: 3)
    workers = ClusterWorkers(opened(tmp_path, [], print), print, print, False, cluster="local", options={})
    workers.close()
    assert workers.number == 3


def ran(folder, rows, monkeypatch, number=None):
    """Run the cells in tasks; what they left, what failed, and what was said."""
    tests = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, str(Path(tests).parent), *sys.path]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)  # no network file system here
    said = []
    cells = opened(folder, rows, said.append)
    parameters = {"cluster": "local", "options": {"cpus_per_task": 3}, "number": number}
    workers = ClusterWorkers(cells, partial(opened, folder, rows), said.append, False, **parameters)
    with writing.locked(cells.out, together=True):  # as the command does
        Jobs(cells, workers, said.append).run(silent)
    assert not workers.folder.exists()
    left = {path.name: json.loads(path.read_text()) for path in folder.glob("*@*")}
    return left, cells.failures, [line for line in said if ": submitted as " not in line]


@pytest.mark.slow
def test_a_cell_runs_after_those_it_needs_and_a_failure_costs_only_itself(tmp_path, monkeypatch):
    rows = [("a", work, (), True), ("b", fail, ("a",), False), ("c", work, ("b",), False), ("d", work, ("a",), False)]
    left, failures, said = ran(tmp_path, rows, monkeypatch)
    assert failures == {"b": "RuntimeError: it went wrong (compare/b.error.txt)"}
    assert said == [f"b: FAILED: {failures['b']}"]
    assert {*left} == {"a@0", "c@0", "d@0"}
    assert left["a@0"][1] < min(left["c@0"][1], left["d@0"][1])
    assert {entry[2] for entry in left.values()} == {"3"}  # threads, as CPUs are asked for


@pytest.mark.slow
def test_a_killed_task_costs_nothing_but_its_cell_until_the_fourth(tmp_path, monkeypatch):
    rows = [("a", partial(die, 2), (), True), ("b", partial(die, 9), ("a",), False), ("c", work, ("b",), False)]
    left, failures, said = ran(tmp_path, rows, monkeypatch)
    assert sorted(left) == ["a@0", "a@1", "a@2", "b@0", "b@1", "b@2", "b@3", "c@0"]
    death = "its task ended without a result (state FINISHED)"
    assert said == [f"{name}: {death}; another one takes it up" for name in "aabbb"]
    assert failures["b"].startswith(f"{death} 4 times. Give the tasks more memory or time")


def started(file, *arguments):
    command = [sys.executable, "-m", "megu_cli", "compare", "-c", str(file), "--cluster", "local", "--jobs", "2"]
    return subprocess.Popen(
        [*command, *arguments], env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where tests run in the background
    )  # fmt: skip


def tasks(folder):
    """Processes that submitit started for cells below a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "submitit.core._submit" in words and any(word.startswith(str(folder)) for word in words):
            found.append(int(place.name))
    return found


@pytest.mark.slow
def test_tasks_give_the_bytes_of_one_process_also_where_one_is_killed(tmp_path):
    one, other = (write_config(tmp_path / name, compare={**COMPARE, "seeds": 1}) for name in ("one", "other"))
    command = [sys.executable, "-m", "megu_cli", "compare", "-c", str(one)]
    subprocess.run(command, env=subprocess_environment(), capture_output=True, check=True)
    running = started(other, "--json")
    os.kill(soon(lambda: tasks(other.parent))[0], signal.SIGKILL)
    out, err = running.communicate(timeout=600)
    assert running.returncode == 0, err
    assert err.count("another one takes it up") == 1
    assert json.loads(out)["failed"] == {}
    assert compared(other) == compared(one)
    files = [path.name for path in (other.parent / "run").rglob("*")]
    assert not [name for name in files if name.startswith(".megu-tmp") or name.endswith(".lock")]


@pytest.mark.slow
def test_ctrl_c_cancels_the_tasks(tmp_path):
    file = write_config(tmp_path, compare=COMPARE)
    running = started(file)
    ids = soon(lambda: tasks(tmp_path))
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=20)
    assert running.returncode == 130
    soon(lambda: gone(ids), seconds=10)
