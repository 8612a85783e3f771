"""`megu compare --jobs` on a few digits: the bytes of one process, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import subprocess_environment, write_config
from test_cells import compared

pytestmark = pytest.mark.slow
COMPARE = {
    "methods": ["original", "retrain", "megu", "finetune", "mask"],
    "variants": {"bare": {"noise.use": "none"}},
    "seeds": 2,
}


def started(file, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "megu_cli", "compare", "-c", str(file), "--jobs", "2", *arguments],
        env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where tests run in the background
    )  # fmt: skip


def workers(parent):
    """Processes that compute cells for another one."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            ours = int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except (OSError, IndexError):
            continue
        if ours and b"--multiprocessing-fork" in words:
            found.append(int(place.name))
    return found


def soon(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found
    return found


def gone(ids):
    return not any(Path(f"/proc/{number}").exists() for number in ids)


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The config of a comparison that one process made."""
    file = write_config(tmp_path_factory.mktemp("serial"), compare=COMPARE)
    command = [sys.executable, "-m", "megu_cli", "compare", "-c", str(file)]
    assert subprocess.run(command, env=subprocess_environment(), capture_output=True, check=False).returncode == 0
    return file


@pytest.mark.parametrize("draw", [0, 1])
def test_workers_killed_three_times_cost_nothing_but_their_cells(serial, tmp_path, draw):
    moments = random.Random(draw)
    file = write_config(tmp_path, compare=COMPARE)
    running = started(file, "--json")
    soon((tmp_path / "run" / "compare").exists)
    for _ in range(3):
        time.sleep(moments.uniform(0.0, 3.0))
        os.kill(moments.choice(soon(lambda: workers(running.pid))), signal.SIGKILL)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert json.loads(out)["failed"] == {}
    assert err.count("another one takes it up") <= 3  # one may have been idle
    assert compared(file) == compared(serial)
    files = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in files if name.startswith(".megu-tmp") or name.endswith(".lock")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_processes_end_with_the_first_and_the_same_command_goes_on(serial, tmp_path, number, code):
    file = write_config(tmp_path, compare=COMPARE)
    running = started(file)
    ids = soon(lambda: workers(running.pid))
    time.sleep(2)
    running.send_signal(number)
    _, err = running.communicate(timeout=10)
    assert running.returncode == code, err
    soon(lambda: gone(ids), seconds=5)
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "compare.json").exists()
    if number == signal.SIGKILL:
        running = started(file)
        _, err = running.communicate(timeout=300)
        assert running.returncode == 0, err
        assert compared(file) == compared(serial)


def test_processes_with_cells_of_their_own_and_one_run_beside_them(serial, tmp_path):
    file = write_config(tmp_path, compare=COMPARE)
    command = [sys.executable, "-m", "megu_cli", "compare", "-c", str(file)]
    how = {"env": subprocess_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    listed = subprocess.run([*command, "--list-cells"], **how, check=True).stdout.split()
    cells = [name for name in listed if name.startswith("1/")]
    # All at once, in the wrong order: each waits for what another one computes.
    running = [subprocess.Popen([*command, "--cell", name], **how) for name in [*reversed(cells)][:4]]
    running.append(subprocess.Popen([*command], **how))
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    assert compared(file) == compared(serial)
