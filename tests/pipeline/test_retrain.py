"""`method: retrain`: a network trained from scratch on the retained images is the result, wrapped as the original."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import listing, refused, write_config
from safetensors.torch import load_file

from megu_cli.cli import tables
from megu_cli.config import Config, load_config
from megu_cli.errors import ConfigError
from megu_cli.evaluation.requirements import judge, parse, refuse_unmeasurable
from megu_cli.evaluation.verdict import verdict
from megu_cli.evaluation.warnings import warnings
from megu_cli.models.sources import build
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.differences import read_run
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.stages import STAGES, of_config
from megu_cli.pipeline.steps.problem import pretrained
from megu_cli.record import fingerprints
from megu_cli.run import artifacts

RETRAINED = {"oracle.safetensors", "finetune.json", "eval.json", "forgotten.json", "runs.jsonl"}


def running(answer) -> list[str]:
    return [line for line in answer.err.splitlines() if ": running" in line]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(finished_folder):
    """The weights that the tiny run was given."""
    return dict(load_file(finished_folder / "run" / "original.safetensors"))


def write_users(folder, trained):
    """A config with a wrapped .pth of the user's; a rater that would fail if it were asked."""
    torch.save({"epoch": 2, "state_dict": trained}, folder / "mine.pth")
    return write_config(
        folder,
        model={"checkpoint": "mine.pth", "preflight": False},
        mllm={"backend": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "none", "images": "none"},
    )


@pytest.fixture
def users(tmp_path, trained):
    return write_users(tmp_path, trained)


@pytest.fixture(scope="module")
def retrained_folder(tmp_path_factory, trained):
    """A finished run of the same config with ``method: retrain``; not to be changed."""
    folder = tmp_path_factory.mktemp("retrained")
    context = RunContext.open(load_config(write_users(folder, trained), ["method=retrain"]))
    context.directory.out.mkdir()
    Pipeline(context).run()
    fingerprints.keep(context)
    return folder


@pytest.fixture
def retrained(retrained_folder, tmp_path):
    """The config of a finished run, in a copy of its own. It does not name the method."""
    shutil.copytree(retrained_folder, tmp_path / "copy")
    return tmp_path / "copy" / "megu.yaml"


def test_the_retrained_model_is_handed_over_as_the_result(megu, users, retrained_folder):
    run = users.parent / "run"
    answer = megu("run", "-c", users, "--retrain", "--require", "verdict=forgotten", "--require", "avg_gap<=0.01")
    assert answer.code == 0, answer.err
    assert [line.split(":")[0] for line in running(answer)] == ["oracle", "finetune", "eval"]
    assert listing(run) == {*RETRAINED, "model.safetensors", "model.pth"}

    oracle = dict(load_file(run / "oracle.safetensors"))
    content = torch.load(run / "model.pth", weights_only=True)
    assert content["epoch"] == 2
    build("small_cnn", 10, 1).load_state_dict(content["state_dict"], strict=True)
    assert equal(content["state_dict"], oracle)
    body, meta = artifacts.read_body(run / "finetune.json"), artifacts.read_meta(run / "finetune.json")
    assert (body["retrained_by"], meta["settings"]["method"]) == ("megu", "retrain")
    assert body["forgotten"]["concepts"] == ["8"]
    assert body["steps"] == 2 * -(-artifacts.read_body(run / "oracle.safetensors")["samples"] // 32)

    assert "retrained ┃" in answer.out
    assert "unlearned" not in answer.out
    assert "JS divergence" not in answer.out
    assert "Verdict: forgotten: it was retrained from scratch" in " ".join(answer.out.split())
    assert "avg_gap<=0.01: met (not measured: the model is the retrained one)" in " ".join(answer.out.split())
    assert f"retrained model: {run / 'model.pth'}" in answer.out
    evaluation = artifacts.read_body(run / "eval.json")
    assert "oracle" not in evaluation
    assert evaluation["comparison"] == {}
    assert evaluation["verdict"]["checks"] == []
    # The same seed gives the same bytes.
    for name in ("model.safetensors", "model.pth", "finetune.json", "oracle.safetensors", "forgotten.json"):
        assert (run / name).read_bytes() == (retrained_folder / "run" / name).read_bytes(), name


def test_later_commands_know_how_the_result_was_made(megu, retrained):
    users, run = retrained, retrained.parent / "run"
    state = megu("status", "-c", users, "--json")
    assert state.code == 0
    assert {name: row["status"] for name, row in state.json["stages"].items()} == dict.fromkeys(
        ("oracle", "finetune", "eval"), "fresh"
    )
    again = megu("run", "-c", users)
    assert running(again) == []
    assert "method: retrain:" in again.err
    assert megu("eval", "-c", users, "--require", "forget_test_acc<=0.05").code == 0
    assert megu("eval", "-c", users, "--require", "retain_test_acc>=1.01").code == 3
    assert megu("report", "-c", users, "--format", "md").code == 0
    report = (run / "report.md").read_text()
    assert "trained from scratch without them, which is exact" in report
    assert "No yardstick" not in report
    assert "unlearned" not in report.replace("not unlearned", "").replace("the unlearned model (model.safetensors)", "")
    assert megu("report", "-c", users, "--card", users.parent / "card.md").code == 0
    card = (users.parent / "card.md").read_text()
    assert card.count("small_cnn, retrained") == 2
    assert "MeGU" not in card
    assert "| train.epochs | 2 |" in card
    assert megu("record", "-c", users, "--request", "DSR-1").code == 0
    assert megu("verify", run / "record.json", "-o", run).code == 0
    assert '"method": "retrain"' in megu("record", "-c", users, "--request", "DSR-1", "--json").out
    images = users.parent / "images.csv"
    assert megu("eval", "-c", users, "--per-image", images).code == 0
    head = images.read_text().splitlines()[0]
    assert head.endswith("right,retrained_class,retrained_probability,retrained_right")
    assert megu("purge", "-c", users, "--oracle", "--yes", "-q").code == 0
    assert not (run / "oracle.safetensors").exists()
    state = megu("status", "-c", users, "--json")
    assert state.code == 0
    assert state.json["stages"]["oracle"]["status"] == "absent"


@pytest.mark.slow
def test_a_second_computation_gives_the_bytes_of_the_record(megu, retrained):
    users, run = retrained, retrained.parent / "run"
    assert megu("record", "-c", users, "--request", "DSR-1").code == 0
    answer = megu("verify", run / "record.json", "-o", run, "-c", users, "--rerun")
    assert answer.code == 0, answer.err
    assert "second computation" in answer.out


def test_the_two_methods_make_each_other_stale_and_share_the_oracle(megu, finished):
    run = finished.parent / "run"
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "oracle.safetensors")}
    answer = megu("run", "-c", finished, "--retrain")
    assert running(answer)[0] == "finetune: running (stale: changed: method megu -> retrain)"
    assert [line.split(":")[0] for line in running(answer)] == ["finetune", "eval"]
    assert equal(dict(load_file(run / "model.safetensors")), dict(load_file(run / "oracle.safetensors")))
    assert {*megu("status", "-c", finished, "--json").json["stages"]} == {"train", "oracle", "finetune", "eval"}
    # What unlearning has left there is no part of the result.
    assert {"labels.safetensors", "noise.safetensors"} <= listing(run)
    assert not [key for key in read_run(run).settings if key.startswith(("labels", "noise"))]
    state = megu("status", "-c", finished, "--set", "method=megu", "--json").json["stages"]
    stale = {name for name, row in state.items() if row["status"] != "fresh"}
    assert stale == {"finetune", "eval"}
    assert state["finetune"]["reason"] == "changed: method retrain -> megu"
    assert len(running(megu("run", "-c", finished, "--set", "method=megu"))) == 2
    assert {name: (run / name).read_bytes() for name in before} == before
    assert megu("status", "-c", finished).code == 0


def test_ones_own_retrained_model_is_handed_over(megu, users, trained):
    run, own = users.parent / "run", users.parent / "again.pth"
    weights = {key: value * 1.01 if value.is_floating_point() else value for key, value in trained.items()}
    torch.save({"model": weights}, own)
    answer = megu("run", "-c", users, "--retrain", "--set", f"eval.oracle={own}")
    assert answer.code == 0, answer.err
    assert [line.split(":")[0] for line in running(answer)] == ["finetune", "eval"]
    assert listing(run) == {*RETRAINED - {"oracle.safetensors"}, "model.safetensors", "model.pth"}
    assert equal(torch.load(run / "model.pth", weights_only=True)["state_dict"], weights)
    assert "your own retrained model (eval.oracle)" in artifacts.read_body(run / "eval.json")["verdict"]["reason"]
    assert "time, seconds" in answer.out
    again = ("-c", users, "--set", f"eval.oracle={own}")
    assert megu("status", *again).code == 0
    torch.save({"model": trained}, own)
    refused(megu("run", *again), "eval.oracle holds the weights of the original model")
    torch.save({"model": {"a": torch.zeros(2)}}, own)
    refused(megu("run", *again), "eval.oracle again.pth does not fit")


FACTORIES = """
import torch
from pathlib import Path
from torch import nn
from megu_cli.models.networks import SmallCNN

def new():
    return SmallCNN(10, 1)

def loaded():
    model = SmallCNN(10, 1)
    model.load_state_dict(torch.load(Path(__file__).with_name("start.pth")))
    return model

def frozen():
    model = loaded()
    model.features.requires_grad_(False)
    nn.init.normal_(model.head.weight)
    return model

def constant():
    model = SmallCNN(10, 1)
    model.position = nn.Parameter(torch.arange(8.0).view(2, 4).sin(), requires_grad=False)
    return model
"""


@pytest.fixture
def factories(tmp_path, trained):
    """Makes a config of a model that a factory builds."""
    torch.save(trained, tmp_path / "start.pth")
    (tmp_path / "makes.py").write_text(FACTORIES)
    return lambda name: write_config(tmp_path, model={"name": f"python:makes.py:{name}"}, train={"epochs": 1})


@pytest.mark.parametrize(("name", "holds"), [("new", False), ("constant", False), ("loaded", True), ("frozen", True)])
def test_a_factory_that_loads_weights_is_known_by_its_layers(factories, name, holds):
    assert pretrained(RunContext.open(load_config(factories(name)))) is holds


def test_weights_that_a_factory_loads_are_not_called_from_scratch(megu, factories):
    file = factories("loaded")
    assert megu("run", "-c", file, "--retrain", "-q").code == 0
    body = artifacts.read_body(file.parent / "run" / "eval.json")
    assert body["retrained_by"] == "factory"
    assert "megu takes your word" in body["verdict"]["reason"]


def test_stages_that_only_unlearning_has_are_refused(megu, users):
    for command in ("labels", "noise", "similarity"):
        for more in ((), ("--dry-run",)):
            answer = megu(command, "-c", users, "--set", "method=retrain", *more)
            refused(answer, f"method: retrain has no stage {command}", "set method: megu")
    refused(megu("run", "-c", users, "--retrain", "--max-steps", "3"), "give only one of --retrain, --max-steps")
    answer = megu("run", "-c", users, "--retrain", "--set", "method=megu")
    refused(answer, "give only one of --retrain, --set method=megu")
    assert not (users.parent / "run").exists()
    answer = megu("finetune", "-c", users, "--set", "method=retrain")
    refused(answer, "finetune cannot run: oracle.safetensors is missing", "megu train --retain-only")


def test_steps_of_a_finetuning_are_refused_where_the_result_is_retrained(megu, retrained_folder, tmp_path):
    file = retrained_folder / "megu.yaml"
    for command in (("run",), ("run", "--dry-run"), ("finetune",), ("finetune", "--dry-run")):
        answer = megu(*command, "-c", file, "--max-steps", "5")
        refused(answer, "--max-steps does not go with method: retrain", "--set method=megu")
    ledger = tmp_path / "ledger.jsonl"
    assert megu("ledger", "add", ledger, "--request", "DSR-1", "--class", "3").code == 0
    pending = ("run", "-c", file, "--ledger", ledger, "--done", "2026-11-25", "-o", retrained_folder / "run")
    refused(megu(*pending, "--max-steps", "5"), "--max-steps does not go with method: retrain")


def test_a_damaged_finetune_json_does_not_change_the_method(megu, retrained, finished):
    for file, method in ((retrained, "retrain"), (finished, "megu")):
        run = file.parent / "run"
        whole = (run / "finetune.json").read_bytes()
        for damaged in (b"{", whole.replace(b"concepts", b"concept"), whole[:-9]):
            (run / "finetune.json").write_bytes(damaged)
            assert load_config(file).retrains is (method == "retrain")
        evaluation = (run / "eval.json").read_bytes()
        for damaged in (None, b"{"):
            (run / "eval.json").unlink() if damaged is None else (run / "eval.json").write_bytes(damaged)
            for command in (("run",), ("status",)):
                refused(megu(*command, "-c", file), str(run), "finetune.json is damaged", "--set method=retrain")
            assert load_config(file, [f"method={method}"]).method == method
        (run / "eval.json").write_bytes(evaluation)
    answer = megu("run", "-c", retrained)
    assert [line.split(":")[0] for line in running(answer)] == ["finetune"]
    assert megu("status", "-c", retrained).code == 0


def test_what_is_needed_for_labels_alone_is_not_asked_for(tmp_path):
    file = write_config(tmp_path, data={"validation": 0.0}, forget={"random": {"count": 5}})
    load_config(file, ["method=retrain"])
    load_config(file, ["method=retrain", "labels.source=transition", "mllm.backend=none"])


def test_the_plan_of_a_retraining_has_no_comparison_with_itself(megu, users, capsys):
    answer = megu("run", "-c", users, "--retrain", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert [row["stage"] for row in answer.json["plan"]] == ["oracle", "finetune", "eval"]
    assert answer.json["time_ratio"] is None
    assert answer.json["total"]["calls"] == 0
    assert not (users.parent / "run").exists()
    tables.plan(answer.json)
    shown = capsys.readouterr().out
    assert "what would run" in shown
    assert "for comparison" not in shown
    assert "of the time of retraining" not in shown


def test_requirements_that_no_retraining_can_meet_are_refused_first(megu, users):
    refuse_unmeasurable(parse(["verdict=forgotten", "agreement>=0.9", "avg_gap<=0.1", "retain_test_acc>=0.5"]))
    for never in ("time_ratio<=1", "time_ratio_total<=1", "time_ratio_reached<=1", "label_agreement>=0"):
        with pytest.raises(ConfigError, match=f"method: retrain never meets the requirement {never}:"):
            refuse_unmeasurable(parse(["agreement>=0.9", never]))
    for command in (("run", "--retrain"), ("eval", "--set", "method=retrain")):
        answer = megu(*command, "-c", users, "--require", "agreement>=0.9", "--require", "time_ratio<=1")
        refused(answer, "never meets the requirement time_ratio<=1:", "Take it out of --require and eval.require")
    settings = ("--set", "method=retrain", "--set", "eval.require=['time_ratio<=1']")
    refused(megu("train", "-c", users, "--retain-only", *settings), "time_ratio<=1")
    assert not (users.parent / "run").exists()


@pytest.mark.slow
def test_a_comparison_runs_megu_whatever_made_the_result(megu, finished):
    assert megu("run", "-c", finished, "--retrain", "-q").code == 0
    answer = megu("compare", "-c", finished, "--methods", "megu", "--seeds", "1", "-q", "--json")
    assert answer.code == 0, answer.err
    assert "labels.safetensors" in listing(finished.parent / "run" / "compare" / "0" / "megu")


@pytest.mark.slow
def test_requests_of_a_ledger_are_done_by_retraining(megu, users):
    ledger = users.parent / "ledger.jsonl"
    assert megu("ledger", "add", ledger, "--request", "DSR-1", "--class", "3").code == 0
    answer = megu("run", "-c", users, "--ledger", ledger, "--done", "2026-11-25", "--retrain")
    assert answer.code == 0, answer.err
    run = users.parent / "run" / "001"
    assert artifacts.read_body(run / "finetune.json")["retrained_by"] == "megu"
    assert json.loads(ledger.read_text().splitlines()[-1])["done"] == "2026-11-25"
    # The next requests start from this model, and know what it was trained without.
    assert megu("ledger", "add", ledger, "--request", "DSR-2", "--class", "5").code == 0
    answer = megu("run", "-c", users, "--ledger", ledger, "--done", "2026-11-26", "--retrain")
    assert answer.code == 0, answer.err
    body = artifacts.read_body(run.with_name("002") / "finetune.json")
    assert {*body["forgotten"]["concepts"]} == {"3", "5"}


def test_every_row_of_a_stage_has_the_same_files():
    retrain = of_config(load_of("retrain"))
    for name, stage in retrain.items():
        first = STAGES[name]
        for field in ("file", "command", "weights", "traces", "purged_on_request", "group", "goal", "switch"):
            assert getattr(stage, field) == getattr(first, field), f"{name}: {field}"
    assert {*STAGES} - {*retrain} == {"similarity", "transition", "labels", "noise"}
    assert list(of_config(load_of("megu"))) == list(STAGES)


def load_of(method: str):
    return Config.model_validate(
        {"data": {"name": "digits"}, "model": {"name": "small_cnn"}, "forget": {"classes": ["8"]}, "method": method}
    )


def test_only_requirements_on_a_distance_to_retraining_hold_by_construction():
    evaluation = {
        "retrained_by": "megu",
        "comparison": {},
        "time": {"time_ratio": None},
        "unlearned": {"forget_test_acc": 0.1, "probe_acc": 0.5},
        "verdict": verdict({"retrained_by": "megu"}, probe_images=0),
    }
    texts = ["verdict=forgotten", "js_divergence<=0.01", "agreement>=0.99", "forget_test_acc<=0.02", "time_ratio<=0.5"]
    outcomes = judge(parse(texts), evaluation)
    assert [outcome.met for outcome in outcomes] == [True, True, True, False, False]
    assert outcomes[4].measured == "no such figure since the model was retrained"
    assert "retrained" not in {v.measured for v in judge(parse(texts), {**evaluation, "retrained_by": "user"})}
    del evaluation["retrained_by"]
    assert not judge(parse(texts), evaluation)[1].met


def test_a_poor_retrained_model_is_said():
    figures = {"retrained_by": "megu", "original": {"retain_test_acc": 0.8}, "unlearned": {"retain_test_acc": 0.7}}
    assert [line.split(":")[0] for line in warnings(figures)] == ["the retrained model is well below the original"]
    assert "or name your own" in warnings(figures)[0]
    assert "eval.oracle names the right file" in warnings({**figures, "retrained_by": "user"})[0]


@pytest.mark.parametrize(("ratio", "said"), [(0.9, False), (1.1, True), (None, False)])
def test_a_run_that_took_longer_than_retraining_says_so(capsys, finished, ratio, said):
    evaluation = artifacts.read_body(finished.parent / "run" / "eval.json")
    evaluation["time"] |= {"time_ratio": ratio}
    tables.evaluation(evaluation)
    assert ("is exact: `megu run --retrain`" in " ".join(capsys.readouterr().out.split())) is said
