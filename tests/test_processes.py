"""Several processes give what one gives; they are started by `accelerate launch`, on the CPU, with gloo."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import listing, subprocess_environment, write_config

from megu_cli import processes
from megu_cli.processes import ALONE, Crew

SCRIPT = Path(__file__).parent / "launched.py"


def launched(*arguments: object, number: int = 2) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of a script, or of ``-m megu_cli``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu is Accelerate's word for processes of torch's own; --cpu would ask MPI for them.
    options = {"num_processes": number, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no",
               "main_process_port": port}  # fmt: skip
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += [item for name, value in options.items() for item in (f"--{name}", value)]
    return called(*launcher, *arguments)


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(a) for a in arguments], env=subprocess_environment(), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict, dict]:
    """The results of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    alone = called(sys.executable, SCRIPT, folder / "one.pt")
    assert alone.returncode == 0, alone.stderr
    two = launched(SCRIPT, folder / "two.pt")
    assert two.returncode == 0, two.stderr
    return tuple(torch.load(folder / f"{name}.pt", weights_only=True) for name in ("one", "two"))


def apart(one, two) -> float:
    """The largest difference of two tensors or state dicts."""
    if isinstance(one, torch.Tensor):
        return float((one.double() - two.double()).abs().max())
    assert one.keys() == two.keys()
    return max(apart(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    ["train", "loss", "uneven", "single", "noise", "accuracy", "finetune", "logits", "features", "few"],
)
def test_two_processes_give_what_one_gives(results, what):
    one, two = results
    assert apart(one[what], two[what]) < 1e-5


@pytest.mark.slow
def test_batch_norm_sees_a_part_at_a_time(results):
    one, two = results
    # Not equal, by its nature: docs/scaling.md says by how much.
    assert apart(one["batch_norm"], two["batch_norm"]) > 1e-5


@pytest.mark.slow
def test_several_processes_go_on_from_one_checkpoint(results):
    for result in results:
        assert apart(result["whole"], result["resumed"]) == 0
    one, two = results
    assert apart(one["whole"], two["whole"]) > 0  # dropout differs: each process draws its own


@pytest.mark.slow
def test_a_whole_run_by_two_processes_has_one_writer(tmp_path):
    file = write_config(tmp_path, noise={"use": "both"}, eval={"oracle": True}, device="cpu")
    answer = launched("-m", "megu_cli", "run", "-c", file, "--json")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)  # one object, printed once
    assert set(result) >= {"original", "mask", "unlearned", "oracle", "comparison"}
    assert answer.stderr.count("finetune: running") == 1
    stages = [json.loads(line) for line in (tmp_path / "run" / "runs.jsonl").read_text().splitlines()]
    assert len(stages) == 8
    assert all("2 processes" in stage["machine"] for stage in stages)
    assert not [name for name in listing(tmp_path / "run") if name.startswith(".megu-tmp") or "checkpoint" in name]
    # What several made, one takes for fresh.
    assert called(sys.executable, "-m", "megu_cli", "status", "-c", file).returncode == 0

    faulty = launched("-m", "megu_cli", "finetune", "-c", file, "--set", "noise.step=1")
    assert faulty.returncode != 0
    assert faulty.stderr.count("unknown key") == 1
    refused = launched("-m", "megu_cli", "compare", "-c", file)
    assert refused.stderr.count("this command is for one process") == 1


def test_slices_make_up_the_whole_and_weights_its_mean():
    for number in (2, 3, 7, 64):
        crews = [Crew() for _ in range(3)]
        for place, crew in enumerate(crews):
            crew.rank, crew.world = place, 3
        parts = [torch.arange(number)[crew.slice(number)] for crew in crews]
        values = torch.rand(number)
        if number < 3:
            assert all(torch.equal(part, torch.arange(number)) for part in parts)
        else:
            assert torch.equal(torch.cat(parts), torch.arange(number))
        means = [values[part].mean() * crew.weight(number) for part, crew in zip(parts, crews, strict=True)]
        assert sum(means) / 3 == pytest.approx(float(values.mean()), rel=1e-5)


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert processes.crew("cpu") is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="several processes need Hugging Face Accelerate"):
        processes.crew("cpu")
    with pytest.raises(Exception, match="for one process"):
        processes.crew("mps")


@pytest.mark.parametrize("command", ["status", "compare", "purge", "report"])
def test_other_commands_refuse_several_processes(megu, config, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = megu(command, "-c", config)
    assert answer.code == 2
    assert "this command is for one process" in answer.err
    assert "where --dry-run is given" in megu("run", "-c", config, "--dry-run").err
