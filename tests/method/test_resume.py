"""A training that is cut short goes on from its checkpoint, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import data_set, listing, process, subprocess_environment, weights, write_config
from test_method import ADVERSARY, Linear, Products, finetuned, forgotten, halves, signs
from torch import nn

from megu_cli import data, training
from megu_cli.config import TrainConfig
from megu_cli.execution import Execution
from megu_cli.execution.runtime import seeded
from megu_cli.pipeline.purge import traces
from megu_cli.pipeline.resume import Resume
from megu_cli.run import artifacts
from megu_cli.run.artifacts import state_digest


class CutError(Exception):
    """Stands for a kill."""


class CutShort(Resume):
    """Saves after every step, and kills after a number of them."""

    def __init__(self, path: Path, steps: int, fingerprint: str = "key") -> None:
        super().__init__(path, fingerprint, 0.0)
        self.left = steps

    def due(self) -> bool:
        return True

    def save(self, state):
        super().save(state)
        self.left -= 1
        if self.left == 0:
            raise CutError


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data_set("digits", limit=120)


def train(digits: data.Dataset, augment: str = "crop+flip", resume=None) -> tuple[str, training.History]:
    """A training that draws all that there is to draw: order, augmentation, dropout; with batch-norm statistics."""
    with seeded(0, "init"):
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10)
        )
    history = training.train_classifier(
        model, digits.train, torch.arange(120), TrainConfig(epochs=3, batch=50, augment=augment), label="train",
        execution=Execution(resume=resume),
        validate=lambda net: training.accuracy(net, digits.train, torch.arange(20)),
    )  # fmt: skip
    return state_digest(model.state_dict()), history


# Three epochs of three steps; a checkpoint after each step and at each epoch's end.
@pytest.mark.parametrize("cut", range(1, 13))
def test_cut_anywhere_it_ends_with_the_same_bytes(digits, tmp_path, cut):
    whole = train(digits)
    path = tmp_path / "train.checkpoint"
    with pytest.raises(CutError):
        train(digits, resume=CutShort(path, cut))
    lines = []
    resume = Resume(path, "key", 1e9, lines.append)
    assert train(digits, resume=resume) == whole
    assert resume.seconds > 0
    assert len(lines) == 1


def test_cut_again_and_again(digits, tmp_path):
    path = tmp_path / "train.checkpoint"
    whole = train(digits, "flip")
    for _ in range(5):
        with pytest.raises(CutError):
            train(digits, "flip", CutShort(path, 2))
    assert train(digits, "flip", Resume(path, "key", 1e9)) == whole


def test_streamed_images_draw_from_the_same_stream_as_dropout(digits, tmp_path):
    # A DataLoader draws from torch's global generator when it is made, which must not move dropout's draws.
    class Streamed(data.MemoryImages):
        def batches(self, order):
            loader = torch.utils.data.DataLoader(
                self, batch_sampler=[i.tolist() for i in order], collate_fn=torch.stack
            )
            return iter(loader)

    split = digits.train
    images = Streamed(split.images.at(torch.arange(120)).pixels)
    streamed = data.Dataset("x", digits.classes, digits.classes, digits.concept_class,
                            data.Split(images, split.labels, split.labels, split.names, split.mean, split.std, ""),
                            digits.held_out, digits.test, digits.withheld)  # fmt: skip
    whole = train(streamed)
    path = tmp_path / "train.checkpoint"
    with pytest.raises(CutError):
        train(streamed, resume=CutShort(path, 6))
    assert train(streamed, resume=Resume(path, "key", 1e9)) == whole


@pytest.mark.parametrize("limit", [None, 15])
@pytest.mark.parametrize("cut", [4, 7, 9, 15])
def test_finetuning_cut_anywhere(tmp_path, limit, cut):
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    noise = torch.rand(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    scores = {"a": [], "b": []}

    def run(name: str, resume=None):
        model = Linear()
        settings = {"max_steps": limit, "patience": 2, "execution": Execution(resume=resume)}

        def validate(net):
            scores[name].append(1 / (1 + len(scores[name])))  # never a gain: patience ends it after three epochs
            return scores[name][-1]

        history = finetuned(model, split, kept, forgotten(gone, 2, [0, 0.5, 0.5], noise), validate=validate, **settings)
        return state_digest(model.state_dict()), history

    whole = run("a")
    assert whole[1].steps == (limit or 18)
    with pytest.raises(CutError):
        run("b", CutShort(tmp_path / "c", cut))
    assert run("b", Resume(tmp_path / "c", "key", 1e9)) == whole
    # One that was killed when all was done but its artifact does nothing more.
    last = run("a", done := CutShort(tmp_path / "d", -1))
    assert run("a", Resume(done.path, "key", 1e9))[0] == last[0]


def test_a_cut_finetuning_keeps_what_its_adversary_has_seen(tmp_path):
    split = signs(hidden=True)
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]

    def run(resume=None, **changes):
        torch.manual_seed(0)
        model = Products()
        settings = {**ADVERSARY, "execution": Execution(resume=resume), **changes}
        finetuned(model, split, kept, forgotten(gone, 1, [0, 0.5, 0.5]), **settings)
        return state_digest(model.state_dict())

    whole = run()
    assert whole != run(adversary=0.0)
    with pytest.raises(CutError):
        run(CutShort(tmp_path / "c", 50))
    assert run(Resume(tmp_path / "c", "key", 1e9)) == whole


def test_a_budget_ends_the_schedule_too():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    rates = []

    class Sees(Resume):
        def due(self) -> bool:
            return True

        def load(self):
            return None

        def save(self, state) -> None:
            rates.append(state["optimizer"]["param_groups"][0]["lr"])

    settings = {"max_steps": 8, "execution": Execution(resume=Sees(Path("x"), "", 0))}
    history = finetuned(Linear(), split, kept, forgotten(gone, 2, [0, 0.5, 0.5]), **settings)
    assert history.steps == 8
    assert len(history.loss) == 2  # six steps an epoch
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[0] == pytest.approx(0.05 * (1 + torch.cos(torch.tensor(torch.pi / 8)).item()) / 2, rel=1e-5)


def test_a_foreign_or_torn_checkpoint_is_as_good_as_none(digits, tmp_path):
    path = tmp_path / "train.checkpoint"
    assert Resume(path, "key", 0).load() is None
    with pytest.raises(CutError):
        train(digits, resume=CutShort(path, 3))
    assert Resume(path, "key", 0).load()["done"] == 3
    assert Resume(path, "another", 0).load() is None
    content = path.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", content[:-500] + b"\x01" + content[-499:]):
        path.write_bytes(damaged)
        assert Resume(path, "key", 0).load() is None
    # Another artifact under that name is not taken for one.
    artifacts.write(path, artifacts.seal(artifacts.Artifact({}, {"state": torch.zeros(3)}), {"fingerprint": "key"}))
    assert Resume(path, "key", 0).load() is None


def test_a_checkpoint_costs_at_most_a_twentieth(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megu_cli.pipeline.resume.time.perf_counter", lambda: now[0])
    resume = Resume(tmp_path / "c", "key", 30.0)
    slow = artifacts.write
    monkeypatch.setattr(artifacts, "write", lambda *a: (slow(*a), now.__setitem__(0, now[0] + 4)))
    assert not resume.due()
    now[0] = 31
    assert resume.due()
    resume.save({"x": 1})
    now[0] = 35 + 31
    assert not resume.due()
    now[0] = 35 + 81
    assert resume.due()


def test_a_finished_run_keeps_no_checkpoint_and_a_purge_names_one(megu, tmp_path):
    file = write_config(tmp_path, checkpoint_seconds=0)
    assert megu("run", "-c", file, "--max-steps", "2").code == 0
    out = tmp_path / "run"
    assert artifacts.read_body(out / "finetune.json")["steps"] == 2
    assert not any(name.endswith(".checkpoint") for name in listing(out))
    artifacts.write(
        out / "finetune.checkpoint", artifacts.seal(artifacts.Artifact({"seconds": 1}), {"stage": "checkpoint"})
    )
    assert "finetune.checkpoint" in {trace.path.name for trace in traces(out)}
    assert megu("run", "-c", file, "--max-steps", "2").code == 0  # fresh: what is left over goes
    assert not (out / "finetune.checkpoint").exists()
    # Without the flag, the budget is another setting.
    reason = megu("status", "-c", file, "--json").json["stages"]["finetune"]["reason"]
    assert reason == "changed: finetune.max_steps 2 -> null"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "artifact"), [("finetune", "model.safetensors"), ("train", "original.safetensors")])
def test_a_killed_process_goes_on_from_its_checkpoint(finished_folder, tmp_path, stage, artifact):
    own = {"checkpoint": str(finished_folder / "run" / "original.safetensors")} if stage == "finetune" else {}
    file = write_config(
        tmp_path,
        model=own,
        checkpoint_seconds=0,
        finetune={"epochs": 6, "patience": 6, "retain_fraction": 2.0, "batch": 8},
        train={"epochs": 12, "batch": 4},
    )
    megu = [sys.executable, "-m", "megu_cli"]
    environment = subprocess_environment()
    out = tmp_path / "run"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        answer = process("-m", "megu_cli", *arguments, "-c", file)
        assert answer.returncode == 0, answer.stderr
        return answer

    if stage == "finetune":
        for before in ("similarity", "labels", "noise"):
            run(before)
    run(stage, "-o", out)
    expected = weights(out)[artifact]
    for name in (artifact, "finetune.json"):
        (out / name).unlink(missing_ok=True)

    with (tmp_path / "err").open("w") as err:
        child = subprocess.Popen([*megu, stage, "-c", str(file)], env=environment, stderr=err, stdout=err)
    checkpoint = out / f"{stage}.checkpoint"
    waited = time.monotonic() + 60
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < waited:
        time.sleep(0.01)
    time.sleep(0.3)
    assert child.poll() is None, (tmp_path / "err").read_text()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert checkpoint.exists()
    assert not (out / artifact).exists()
    answer = run(stage)
    assert f"{stage}: goes on after" in answer.stderr
    assert weights(out)[artifact] == expected
    assert not checkpoint.exists()
