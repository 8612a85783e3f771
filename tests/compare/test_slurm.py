"""A comparison whose cells are tasks of Slurm: a cluster of one node, which lives as long as these tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import subprocess_environment, write_config
from test_cells import compared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed (apt-get install slurm-wlm)"),
]
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
COMPARE = {"methods": ["megu", "mask"], "seeds": 2}
# Four times the two CPUs that a small machine has: the page asks for four a task, and two tasks are to run at once.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=1
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""
# What Slurm's accounting would say, which needs a database server.
SACCT = "echo 'JobID|State|NodeList'; squeue --states=all --array --noheader --format='%i|%T|%N'"


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def soon(condition, what: str, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log"))
            pytest.fail(f"{what} after {seconds} s\n{logs}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and `megu` work; all files and processes of the cluster go with it."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as daemons:
        folder = Path(name)  # short: the path of a socket has at most 107 characters
        host = socket.gethostname().partition(".")[0]
        settings = CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ports=free_ports(2))
        (folder / "slurm.conf").write_text(settings)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "bin").mkdir()
        programs = {"megu": f'exec {sys.executable} -m megu_cli "$@"', "sacct": SACCT}
        for program, line in programs.items():
            (folder / "bin" / program).write_text(f"#!/bin/sh\n{line}\n")
            (folder / "bin" / program).chmod(0o755)
        system = f"{os.environ['PATH']}:/usr/sbin"
        environment = {**subprocess_environment(), "SLURM_CONF": str(folder / "slurm.conf"),
                       "PATH": f"{folder / 'bin'}:{system}"}  # fmt: skip
        # A test may itself run as a job.
        for key in [key for key in environment if key.startswith(("SLURM_", "SBATCH_")) and key != "SLURM_CONF"]:
            del environment[key]

        def start(*command: str) -> None:
            log = daemons.enter_context((folder / f"{command[0]}.out.log").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            daemons.callback(process.wait, 30)
            daemons.callback(process.terminate)

        def asked(*command: str) -> str:
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

        munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed",
                 "log-file": "munged.log"}  # fmt: skip
        # Forced, since nobody else has to get to the socket.
        start("munged", "--foreground", "--force", *(f"--{key}={folder / file}" for key, file in munge.items()))
        soon((folder / "munge.socket").exists, "munged does not answer", folder)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        soon(lambda: "idle" in asked("sinfo", "-h", "-o", "%t"), "the node is not idle", folder)
        try:
            yield environment
        finally:
            asked("scancel", "--user", getpass.getuser())
            soon(lambda: not asked("squeue", "-h"), "there still are jobs", folder)


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> Path:
    """The config of a comparison that one process made, with as many threads as the page gives a task."""
    file = write_config(tmp_path_factory.mktemp("serial"), compare=COMPARE)
    environment = {**subprocess_environment(), "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-m", "megu_cli", "compare", "-c", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return file


def tensors(file: Path) -> dict[str, bytes]:
    """The bytes of every safetensors file of a run."""
    run = file.parent / "run"
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def test_the_commands_of_the_page_give_the_bytes_of_one_process(slurm, serial, tmp_path):
    blocks = [part.partition("\n```")[0] for part in PAGE.read_text().split("```sh\n")[1:]]
    (script,) = [block for block in blocks if "sbatch" in block]
    file = write_config(tmp_path, compare=COMPARE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=slurm, capture_output=True, text=True, check=False
    )
    logs = {log.name: log.read_text() for log in tmp_path.glob("slurm-*.out")}
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    assert len(logs) == len((tmp_path / "cells.txt").read_text().split()) == 9
    assert "running" not in done.stderr  # the last command finds all that it gathers
    assert len(tensors(serial)) > 10
    assert tensors(file) == tensors(serial)
    assert compared(file) == compared(serial)


def test_an_option_submits_the_cells_and_a_task_that_is_killed_is_submitted_again(slurm, serial, tmp_path):
    pytest.importorskip("submitit")
    file = write_config(tmp_path, compare=COMPARE)
    options = [f"--cluster-option={option}" for option in ("slurm_partition=main", "cpus_per_task=4", "timeout_min=30")]
    command = ["megu", "compare", "-c", str(file), "--cluster", "slurm", *options]
    # The tasks take the threads that `cpus_per_task` gives them.
    environment = {key: value for key, value in slurm.items() if key != "OMP_NUM_THREADS"}

    def asked(*words: str) -> list[str]:
        done = subprocess.run(words, env=slurm, capture_output=True, text=True, check=True)
        return done.stdout.split()

    refused = subprocess.run(
        [*command, "--cluster-option=slurm_partition=none"], env=slurm, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "error: --cluster: the tasks cannot be submitted: sbatch: error: " in refused.stderr

    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listing = ("squeue", "--noheader", "--array", "--states=running", "--format=%i")
    soon(lambda: asked(*listing), "no task runs", Path(slurm["SLURM_CONF"]).parent)
    asked("scancel", "--signal=KILL", "--full", asked(*listing)[0])
    _, err = running.communicate(timeout=900)
    assert running.returncode == 0, err
    assert err.count("its task ended without a result (state CANCELLED); another one takes it up") == 1, err
    assert err.count(": submitted as ") == 10  # nine cells, and one again
    assert tensors(file) == tensors(serial)
    assert compared(file) == compared(serial)


def test_tasks_that_wait_in_the_queue_go_on_when_the_first_process_is_killed(slurm, tmp_path):
    pytest.importorskip("submitit")
    file = write_config(tmp_path, compare=COMPARE)
    # All CPUs of the node: one task runs, and the others wait.
    options = ["--cluster-option=slurm_partition=main", "--cluster-option=slurm_cpus_per_task=8"]
    environment = {**slurm, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        ["megu", "compare", "-c", str(file), "--cluster", "slurm", *options],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def states() -> dict[str, str]:
        """Task -> state, of the tasks of this run."""
        command = ("squeue", "--noheader", "--array", "--states=all", "--format=%i %T %o")
        lines = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout.splitlines()
        rows = [line.split() for line in lines]
        return {row[0]: row[1] for row in rows if row[2].startswith(str(tmp_path))}

    folder = Path(slurm["SLURM_CONF"]).parent
    soon(lambda: {"RUNNING", "PENDING"} <= {*states().values()}, "no task runs while another waits", folder)
    running.kill()
    running.wait()
    soon(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & {*states().values()}, "tasks go on", folder, seconds=300)
    assert {*states().values()} == {"COMPLETED"}
    assert len(states()) > 1
