"""The ledger: requests that come one after another, done in one run, and nothing of them comes back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Megu, write_config
from scipy.stats import fisher_exact
from torch import nn
from torch.nn.functional import cross_entropy

from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext
from megu_cli.record import envelope
from megu_cli.record.ledger import Ledger
from megu_cli.run import artifacts

# Long enough for digits to be learned, and for images to be forgotten.
LEARNED = {
    "data": {"limit": 800},
    "train": {"epochs": 10, "batch": 32, "lr": 0.02},
    "finetune": {"epochs": 2, "retain_fraction": 4, "batch": 64, "forget_batch": 32},
}


def add(megu: Megu, ledger: Path, request: str, *named: object) -> None:
    dates = ["--received", "2026-11-02", "--due", "2026-12-02"]
    answer = megu("ledger", "add", ledger, "--request", request, *named, *dates)
    assert answer.code == 0, answer.err


def write_list(path: Path, names: list[str]) -> Path:
    path.write_text("path\n" + "".join(f"{name}\n" for name in names))
    return path


def names_of(file: Path, digit: str, number: int, skip: int = 0) -> list[str]:
    """Names of training images of a digit."""
    data = RunContext.open(load_config(file, ["forget={classes: ['0']}"])).inputs.data
    chosen = torch.where(data.train.labels == data.classes.index(digit))[0][skip : skip + number]
    return [data.train.names[i] for i in chosen.tolist()]


def test_pending_requests_are_done_in_one_run_and_the_next_run_goes_on_from_it(megu, tmp_path):
    file, ledger = write_config(tmp_path), tmp_path / "ledger.jsonl"
    names = names_of(file, "3", 5)
    add(megu, ledger, "R1", "--class", "8")
    add(megu, ledger, "R2", "--samples", write_list(tmp_path / "r2.csv", names))
    dry = megu("run", "-c", file, "--ledger", ledger, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "run").exists()

    answer = megu("run", "-c", file, "--ledger", ledger, "--done", "2026-11-25", "--json")
    assert answer.code == 0, answer.err
    first = tmp_path / "run" / "001"
    request = RunContext.open(load_config(file, [f"forget={{samples: {first / 'requests.csv'}}}"])).inputs.request
    eights = int((RunContext.open(load_config(file)).inputs.data.train.labels == 8).sum())
    assert (len(request.forget), request.classes) == (eights + 5, [8])
    assert answer.json["request"]["forget"] == eights + 5
    rows = megu("ledger", "list", ledger, "--json").json["requests"]
    record = envelope.read(first / "record.json")
    assert [(row["request"], row["done"], row["record"]) for row in rows] == [
        ("R1", "2026-11-25", record.digest), ("R2", "2026-11-25", record.digest),
    ]  # fmt: skip
    assert [one["id"] for one in json.loads(record.payload)["predicate"]["requests"]] == ["R1", "R2"]
    assert megu("verify", first / "record.json", "-o", first, "--list", tmp_path / "r2.csv").code == 0
    assert "no request is pending" in megu("run", "-c", file, "--ledger", ledger, "--done", "2026-11-26").out

    # The list's names went with the purge, and the next run needs none of it.
    assert megu("purge", "-o", first, "--yes", "-q").code == 0
    assert not (first / "requests.csv").exists()
    add(megu, ledger, "R3", "--class", "1")
    answer = megu("run", "-c", file, "--ledger", ledger, "--done", "2026-11-26", "--json")
    assert answer.code == 0, answer.err
    second = artifacts.read_body(tmp_path / "run" / "002" / "finetune.json")
    assert second["forgotten"]["concepts"] == ["1", "8"]
    assert len(second["forgotten"]["images"]) == 5
    known = artifacts.read_body(first / "finetune.json")["provenance"]["tensors"]
    assert second["provenance"]["parent"] == known


@pytest.mark.slow
def test_a_record_of_a_ledger_can_be_computed_again(megu, tmp_path):
    file, ledger = write_config(tmp_path), tmp_path / "ledger.jsonl"
    for request, digit in (("R1", "8"), ("R2", "3")):
        add(megu, ledger, request, "--class", digit)
        assert megu("run", "-c", file, "--ledger", ledger, "--done", "2026-11-25", "-q").code == 0
    out = tmp_path / "run" / "002"
    answer = megu("verify", out / "record.json", "-o", out, "--rerun", "-c", file, "--ledger", ledger, "-q")
    assert answer.code == 0, answer.err
    assert "holds: second computation" in answer.out


@pytest.mark.parametrize("change", ["edited", "removed", "moved", "damaged"])
def test_a_ledger_that_was_changed_is_refused(megu, tmp_path, change):
    ledger = tmp_path / "ledger.jsonl"
    for number in range(3):
        add(megu, ledger, f"R{number}", "--class", str(number))
    lines = ledger.read_bytes().splitlines(keepends=True)
    if change == "edited":  # by someone who knows how a checksum is made
        entry = json.loads(lines[1])
        del entry["checksum"]
        entry["forget"] = {"classes": ["9"]}
        lines[1] = json.dumps({"checksum": artifacts.digest(entry), **entry}).encode() + b"\n"
    elif change == "removed":
        del lines[1]
    elif change == "moved":
        lines[0], lines[1] = lines[1], lines[0]
    else:
        lines[2] = lines[2].replace(b'"R2"', b'"R9"')
    ledger.write_bytes(b"".join(lines))
    for command in (["list", ledger], ["add", ledger, "--request", "R7", "--class", "1"]):
        answer = megu("ledger", *command)
        assert answer.code == 2
        assert "was changed" in answer.err
    assert ledger.read_bytes() == b"".join(lines)


def test_a_line_that_a_kill_has_cut_is_replaced(megu, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    add(megu, ledger, "R0", "--class", "0")
    whole = ledger.read_bytes()
    ledger.write_bytes(whole + whole[: len(whole) // 2])
    add(megu, ledger, "R1", "--class", "1")
    assert [entry.id for entry in Ledger(ledger).entries()] == ["R0", "R1"]


def test_what_cannot_be_done_later_is_refused_now(megu, tmp_path):
    ledger = tmp_path / "book" / "ledger.jsonl"
    outside = write_list(tmp_path / "list.csv", ["train/0"])
    for named, told in (
        (["--request", "R1", "--samples", outside], "lies outside the ledger's folder"),
        (["--request", "j.doe@example.org", "--class", "1"], "not a name or an address"),
        (["--request", "R1"], "give exactly one of"),
        (["--request", "R1", "--class", "1", "--received", "2026-02-01", "--due", "2026-01-01"], "--due lies before"),
    ):
        answer = megu("ledger", "add", ledger, *named)
        assert answer.code == 2
        assert told in answer.err
    assert not ledger.exists()
    add(megu, ledger, "R1", "--class", "1")
    answer = megu("ledger", "add", ledger, "--request", "R1", "--class", "2")
    assert answer.code == 2
    assert "in the ledger already" in answer.err


def test_a_list_that_was_changed_since_is_refused(megu, tmp_path):
    file, ledger = write_config(tmp_path), tmp_path / "ledger.jsonl"
    names = names_of(file, "3", 5)
    add(megu, ledger, "R1", "--samples", write_list(tmp_path / "r1.csv", names))
    write_list(tmp_path / "r1.csv", names[:4])
    answer = megu("run", "-c", file, "--ledger", ledger, "--done", "2026-11-25")
    assert answer.code == 2
    assert "was changed since it was added" in answer.err
    assert len(Ledger(ledger).pending()) == 1


def test_what_is_overdue_is_marked(megu, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    add(megu, ledger, "R1", "--class", "1")
    rows = megu("ledger", "list", ledger, "--on", "2026-12-03", "--json").json["requests"]
    assert [row["overdue"] for row in rows] == [True]
    assert "OVERDUE" in megu("ledger", "list", ledger, "--on", "2026-12-03").out
    assert "pending" in megu("ledger", "list", ledger, "--on", "2026-12-02").out


@pytest.mark.slow
def test_twenty_requests_one_after_another_and_nothing_comes_back(megu, tmp_path):
    file, ledger = write_config(tmp_path, **LEARNED), tmp_path / "ledger.jsonl"
    wanted: list[list[str]] = []
    whole = (13, 14)
    for number in range(20):
        digit = str(number % 10)
        if number in whole:
            add(megu, ledger, f"R{number}", "--class", digit)
            wanted.append(names_of(file, digit, 1000))
        else:
            wanted.append(names_of(file, digit, 6, skip=6 * (number // 10)))
            add(megu, ledger, f"R{number}", "--samples", write_list(tmp_path / f"r{number}.csv", wanted[-1]))
        more = ["--set", "eval.oracle=true"] if number == 19 else []
        # The word already is never said: the ledger knows the model, and the model what it has forgotten.
        answer = megu("run", "-c", file, "--ledger", ledger, "--done", "2026-11-25", "--json", "-q", *more)
        assert answer.code == 0, answer.err
    out = tmp_path / "run" / "020"
    assert [entry.done is not None for entry in Ledger(ledger).entries()] == [True] * 20
    config = load_config(file, [f"model.checkpoint={tmp_path / 'run/019/model.safetensors'}", "model.preflight=false"])
    work = RunContext.open(config.model_copy(update={"out": out}))
    position = {name: i for i, name in enumerate(work.inputs.data.train.names)}
    oracle = work.load(artifacts.read(out / "oracle.safetensors").tensors, "oracle")
    original = work.load(artifacts.read(tmp_path / "run" / "001" / "original.safetensors").tensors, "original")
    known: dict[str, list[int]] = {}
    loss: dict[str, float] = {}
    # Images whose class stays: of the others, both models know none.
    stays = [names for number, names in enumerate(wanted) if number % 10 not in (3, 4)]
    singles = torch.tensor([position[name] for names in stays for name in names])
    for name, model in (("unlearned", work.unlearned()), ("oracle", oracle), ("original", original)):
        hits = []
        for names in wanted:
            index = torch.tensor([position[one] for one in names])
            hits.append(int((answers(model, work, index).argmax(1) == work.inputs.data.train.labels[index]).sum()))
        known[name] = hits
        loss[name] = float(cross_entropy(answers(model, work, singles), work.inputs.data.train.labels[singles]))
    # No request's images are known better than to the oracle, as far as their number tells: Fisher's exact test,
    # one-sided, at 5% for all twenty together.
    for number, (own, other) in enumerate(zip(known["unlearned"], known["oracle"], strict=True)):
        n = len(wanted[number])
        p = fisher_exact([[own, n - own], [other, n - other]], alternative="greater").pvalue
        assert p > 0.05 / 20, f"request {number}: {own} of {n} known, oracle {other}"
    assert [known["unlearned"][i] for i in whole] == [0, 0]
    # And as a whole: the loss is nearer to the oracle's than to that of the original, which learned them.
    assert loss["unlearned"] > math.sqrt(loss["original"] * loss["oracle"])


def answers(model: nn.Module, work: RunContext, index: torch.Tensor) -> torch.Tensor:
    (images,) = work.inputs.data.train.batches([index])
    with torch.inference_mode():
        return model(images)


def test_a_list_that_is_not_there_is_refused(megu, tmp_path):
    answer = megu("ledger", "add", tmp_path / "ledger.jsonl", "--request", "r1", "--samples", tmp_path / "gone.csv")
    assert answer.code == 2, answer.err
    assert "gone.csv" in answer.err
    assert not (tmp_path / "ledger.jsonl").exists()
