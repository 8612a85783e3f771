"""What is rebuilt, what is kept, and why: freshness by content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import listing, weights, write_config, write_folder

import megu_cli
from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.stages import STAGES
from megu_cli.run import artifacts


def ran(err: str) -> list[str]:
    return [line.split(":")[0] for line in err.splitlines() if ": running" in line]


def states(config: Path, *overrides: str) -> dict[str, str]:
    pipeline = Pipeline(RunContext.open(load_config(config, list(overrides))))
    return {name: state.status for name, state in pipeline.status().items()}


@pytest.mark.slow
def test_no_forward_pass_without_learning_is_larger_than_eval_batch(megu, config):
    sizes = []

    def note(module, inputs, output):
        if torch.is_inference_mode_enabled():
            sizes.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        answer = megu("run", "-c", config, "--set", "eval.batch=50", "--set", "eval.relearn_epochs=1")
    finally:
        hook.remove()
    assert answer.code == 0, answer.err
    assert max(sizes) == 50


def test_a_run_writes_every_artifact_and_a_second_one_computes_nothing(megu, config):
    first = megu("run", "-c", config, "--set", "eval.oracle=true")
    assert first.code == 0, first.err
    out = config.parent / "run"
    expected = {stage.file for stage in STAGES.values()} | {"model.safetensors", "runs.jsonl", "forgotten.json"}
    assert listing(out) == expected
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}

    second = megu("run", "-c", config, "--set", "eval.oracle=true")
    assert second.code == 0
    assert ran(second.err) == []
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"} == before
    assert second.out == first.out


def test_where_labels_come_from_is_in_the_finetunings_key_too(megu, finished):
    # It decides whether they are reassigned, also where the labels of both are the same.
    reason = megu("status", "-c", finished, "--set", "labels.source=transition", "--json").json["stages"]["finetune"]
    assert "labels.source" in STAGES["finetune"].settings
    assert reason["status"] == "stale"


def test_the_fingerprint_is_pinned(finished):
    # A literal: a change of what makes a key is a decision, since it makes every user's artifacts stale.
    meta = artifacts.read_meta(finished.parent / "run" / "transition.safetensors")
    assert set(meta) == {
        *("format", "stage", "version", "settings", "inputs", "fingerprint", "lineage", "weights", "seed", "megu"),
        *("content", "checksum"),
    }  # fmt: skip
    parts = {
        "stage": "transition",
        "version": 1,
        "settings": {"transition": {"temperature": 3.0}},
        "inputs": {"a": "b"},
    }
    assert artifacts.digest(parts) == "915be7a52974feb01b435692f995e60ce61a3e172a0cce94f2f5730b9ba8cb3e"


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("noise.steps=5", ["noise", "finetune", "eval"]),
        ("noise.strength=full", ["finetune", "eval"]),
        ("transition.temperature=2", ["transition", "labels", "noise", "finetune", "eval"]),
        ("eval.probe_samples=150", ["eval"]),
        ("finetune.lr=0.03", ["finetune", "eval"]),
        ("labels.source=prediction", ["labels", "noise", "finetune", "eval"]),
        ("device=cpu", []),
        ("eval.require=[forget_test_acc<=1]", []),
    ],
)
def test_a_changed_setting_reruns_only_what_depends_on_it(megu, finished, setting, stages):
    answer = megu("run", "-c", finished, "--set", setting)
    assert answer.code == 0, answer.err
    # An unchanged output stops the cascade, so what ran may be fewer, but it starts with the right stage.
    assert ran(answer.err)[:1] == stages[:1]
    assert set(ran(answer.err)) <= set(stages)
    if setting.startswith("noise.steps"):
        assert ran(answer.err) == stages


def test_status_names_the_setting_that_changed(megu, finished):
    assert megu("status", "-c", finished).code == 0
    answer = megu("status", "-c", finished, "--set", "noise.steps=7", "--json")
    assert answer.code == 1
    rows = answer.json["stages"]
    assert rows["labels"]["status"] == "fresh"
    assert rows["noise"] == {
        "status": "stale", "reason": "changed: noise.steps 4 -> 7", "file": "noise.safetensors"
    }  # fmt: skip
    assert "noise is stale" in rows["finetune"]["reason"]


def test_an_unchanged_output_stops_the_cascade(megu, finished):
    # With one forgotten class, temperature moves T but may leave the hard labels; force shows the same more plainly.
    answer = megu("labels", "-c", finished, "--force")
    assert ran(answer.err) == ["labels"]
    assert ran(megu("run", "-c", finished).err) == []


def test_touching_reruns_nothing_and_a_changed_rating_does(megu, finished, tmp_path):
    shipped = Path(megu_cli.__file__).parent / "mllm" / "ratings" / "digits.json"
    ratings = tmp_path / "ratings.json"
    shutil.copy(shipped, ratings)
    use = ("-c", finished, "--set", f"mllm.ratings={ratings}")
    assert ran(megu("run", *use).err) == []  # the same content under another name
    os.utime(ratings, (1, 1))
    assert ran(megu("run", *use).err) == []
    content = json.loads(ratings.read_text())
    content["scores"]["8"]["0"] = 9
    ratings.write_text(json.dumps(content))
    assert "changed: the recorded ratings" in megu("status", *use, "--json").json["stages"]["similarity"]["reason"]
    assert ran(megu("run", *use).err)[:2] == ["similarity", "transition"]


def test_a_corrupt_artifact_is_rebuilt_by_run_and_refused_by_a_stage(megu, finished):
    out = finished.parent / "run"
    before = weights(out)
    damaged = bytearray(before["labels.safetensors"])
    damaged[-3] ^= 1
    (out / "labels.safetensors").write_bytes(bytes(damaged))
    assert states(finished)["labels"] == "corrupt"

    refused = megu("noise", "-c", finished, "--force")
    assert refused.code == 2
    assert "labels.safetensors is corrupt" in refused.err
    assert "megu labels" in refused.err

    answer = megu("run", "-c", finished)
    assert ran(answer.err) == ["labels"]
    assert "corrupt" in answer.err
    assert weights(out) == before


def test_an_unlearned_model_that_was_changed_is_rebuilt(megu, finished):
    out = finished.parent / "run"
    before = weights(out)
    shutil.copy(out / "original.safetensors", out / "model.safetensors")
    assert states(finished)["finetune"] == "corrupt"
    assert ran(megu("run", "-c", finished).err) == ["finetune"]
    assert weights(out) == before


def test_artifacts_may_be_gone_when_a_later_one_fits(megu, finished):
    out = finished.parent / "run"
    for name in ("noise.safetensors", "labels.safetensors", "similarity.json"):
        (out / name).unlink()
    answer = megu("status", "-c", finished, "--json")
    assert answer.code == 0
    assert answer.json["stages"]["noise"]["status"] == "absent"
    assert ran(megu("run", "-c", finished).err) == []
    # ... but not when what they would be made from has changed, however far up.
    assert ran(megu("run", "-c", finished, "--set", "labels.alpha=0").err)[:1] == ["labels"]


def test_a_stage_alone_refuses_artifacts_of_another_request(megu, finished):
    answer = megu("noise", "-c", finished, "--set", "forget.classes=[3]")
    assert answer.code == 2
    assert "labels.safetensors is stale" in answer.err
    assert "the forget request" in answer.err


def test_stage_by_stage_in_separate_directories_gives_the_same_bytes(megu, finished):
    whole = finished.parent / "run"
    takes = {
        "similarity": [],
        "labels": ["original.safetensors", "transition.safetensors"],
        "noise": ["original.safetensors", "labels.safetensors"],
        "finetune": ["original.safetensors", "transition.safetensors", "labels.safetensors", "noise.safetensors"],
    }
    for stage, files in takes.items():
        job = finished.parent / stage
        job.mkdir()
        for file in files:
            shutil.copy(whole / file, job / file)
        answer = megu(stage, "-c", finished, "-o", job)
        assert answer.code == 0, answer.err
    for stage, file in {
        "similarity": "transition.safetensors",
        "labels": "labels.safetensors",
        "noise": "noise.safetensors",
        "finetune": "model.safetensors",
    }.items():
        assert (finished.parent / stage / file).read_bytes() == (whole / file).read_bytes()


def test_force_keeps_the_old_artifact_until_the_new_one_is_there(megu, finished, monkeypatch):
    out = finished.parent / "run"
    before = weights(out)
    from megu_cli.pipeline.steps import noise

    def fail(work, inputs):
        raise RuntimeError("no")

    monkeypatch.setattr(noise, "noise", fail)
    answer = megu("noise", "-c", finished, "--force")
    assert answer.code == 1
    assert "RuntimeError: no" in answer.err
    assert "Traceback" not in answer.err
    assert weights(out) == before


def test_dry_run_writes_nothing(megu, config):
    answer = megu("run", "-c", config, "--dry-run", "--json")
    assert answer.code == 0
    # The table's order; an oracle was not asked for.
    run = [row["stage"] for row in answer.json["plan"] if row["action"] == "run"]
    assert run == [name for name in STAGES if name != "oracle"]
    assert not (config.parent / "run").exists()


def test_the_unlearned_model_is_a_drop_in(finished):
    from safetensors.torch import load_file

    out = finished.parent / "run"
    original, unlearned = load_file(out / "original.safetensors"), load_file(out / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in original.items()} == {k: (v.shape, v.dtype) for k, v in unlearned.items()}
    work = RunContext.open(load_config(finished))
    work.build().load_state_dict(unlearned, strict=True)
    assert all(not torch.equal(original[k], unlearned[k]) for k in original)


@pytest.mark.slow
def test_a_pth_checkpoint_gives_the_same_model_as_its_safetensors_twin(megu, finished):
    from safetensors.torch import load_file, save_file

    folder = finished.parent
    state = load_file(folder / "run" / "original.safetensors")
    save_file(state, folder / "mine.safetensors")
    torch.save(state, folder / "mine.pth")
    for name in ("mine.safetensors", "mine.pth"):
        answer = megu("run", "-c", finished, "-o", folder / f"out-{name}", "--set", f"model.checkpoint={folder / name}",
                      "--set", "eval.oracle=false", "--set", "data.validation_from=train")  # fmt: skip
        assert answer.code == 0, answer.err
    twins = [folder / f"out-{name}" / "model.safetensors" for name in ("mine.safetensors", "mine.pth")]
    assert twins[0].read_bytes() == twins[1].read_bytes() == (folder / "run" / "model.safetensors").read_bytes()


def test_time_is_reported_against_retraining(finished):
    evaluation = artifacts.read_body(finished.parent / "run" / "eval.json")
    entries = [json.loads(line) for line in (finished.parent / "run" / "runs.jsonl").read_text().splitlines()]
    seconds = {entry["stage"]: entry["seconds"] for entry in entries}
    own = sum(seconds[name] for name in ("labels", "noise", "finetune"))
    assert evaluation["time"]["time_ratio"] == pytest.approx(own / seconds["oracle"])
    total = own + seconds["similarity"] + seconds["transition"]
    assert evaluation["time"]["time_ratio_total"] == pytest.approx(total / seconds["oracle"])


COARSE = {"superclasses": {"round": ["0", "6", "8", "9"], "other": ["1", "2", "3", "4", "5", "7"]}}


@pytest.mark.parametrize(
    ("data", "forget", "mode"),
    [
        ({}, {"random": {"fraction": 0.1}}, "proxy"),
        ({}, {"samples": "list.csv"}, "proxy"),
        (COARSE, {"subclasses": ["8"]}, "proxy"),
        (COARSE, {"classes": ["round"]}, "proxy"),
        ({}, {"classes": ["3", "8"]}, "proxy"),
    ],
)
def test_every_kind_of_request_runs_to_the_end(megu, tmp_path, data, forget, mode):
    (tmp_path / "list.csv").write_text("\n".join(str(i) for i in range(20)))
    if data and "classes" in forget:
        data = {"superclasses": {**COARSE["superclasses"], "other": ["1", "2", "3"], "more": ["4", "5", "7"]}}
    file = write_config(tmp_path, data=data, forget=forget, eval={"oracle": True})
    answer = megu("run", "-c", file, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["comparison"]["unlearned"]["avg_gap"] is not None
    assert artifacts.read_body(tmp_path / "run" / "labels.safetensors")["mode"] == mode
    assert megu("status", "-c", file).code == 0
    assert ran(megu("run", "-c", file).err) == []


@pytest.mark.parametrize("mode", ["soft", "sample", "hard"])
@pytest.mark.parametrize("use", ["both", "none"])
def test_every_switch_of_labels_and_noise(megu, tmp_path, mode, use):
    file = write_config(tmp_path, forget={"random": {"count": 30}}, labels={"mode": mode}, noise={"use": use})
    assert megu("run", "-c", file).code == 0
    for source in ("transition", "prediction", "random"):
        assert megu("labels", "-c", file, "--set", f"labels.source={source}").code == 0


@pytest.mark.slow
def test_an_image_folder_touched_and_changed(megu, tmp_path):
    write_folder(tmp_path / "images", number=12)
    names = ["cat", "dog", "eel"]
    scores = {a: {b: 5 for b in names if b != a} for a in names}
    (tmp_path / "ratings.json").write_text(json.dumps({"classes": names, "scores": scores, "rater": "this test"}))
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "images", "image_size": 8, "limit": None},
        forget={"classes": ["dog"]},
        mllm={"ratings": "ratings.json"},
    )
    assert megu("run", "-c", file).code == 0
    image = tmp_path / "images" / "train" / "cat" / "3.png"
    os.utime(image, (1, 1))
    assert megu("status", "-c", file).code == 0
    assert ran(megu("run", "-c", file).err) == []
    shutil.copy(tmp_path / "images" / "train" / "cat" / "4.png", image)
    rows = megu("status", "-c", file, "--json").json["stages"]
    assert rows["train"]["reason"] == "changed: the training data"
    assert rows["labels"]["reason"].startswith("changed: the training data")
    assert {rows[name]["status"] for name in ("similarity", "transition")} == {"fresh"}
    assert ran(megu("run", "-c", file).err)[0] == "train"


def user_files(folder: Path) -> dict[str, bytes]:
    """What a user may have in a folder that is named as the run directory."""
    torch.save({"weights": torch.ones(5)}, folder / "mine.pth")
    from safetensors.torch import save_file

    save_file({"weights": torch.ones(500)}, folder / "mine.safetensors", metadata={"format": "pt"})
    return {
        "model.safetensors": (folder / "mine.safetensors").read_bytes(),
        "labels.safetensors": b"a file of another program, which no reader of safetensors takes for one",
        "eval.json": b'{"meta": {"author": "me"}, "accuracy": 1}',
        "runs.jsonl": b'{"time": "today", "loss": 1}\n',
        "original.safetensors": (folder / "mine.safetensors").read_bytes(),
        "finetune.json": b"my own notes",
    }


@pytest.mark.parametrize("name", ["model.safetensors", "labels.safetensors", "eval.json", "runs.jsonl",
                                  "original.safetensors", "finetune.json"])  # fmt: skip
def test_a_file_of_the_users_is_not_replaced(megu, config, name):
    out = config.parent / "run"
    out.mkdir()
    content = user_files(config.parent)[name]
    (out / name).write_bytes(content)
    for arguments in (["run"], ["run", "--dry-run"], ["run", "--force"]):
        answer = megu(*arguments, "-c", config)
        assert answer.code == 2, answer.err
        assert name in answer.err
        assert "-o" in answer.err
    assert (out / name).read_bytes() == content
    assert listing(out) == {name}


def test_a_file_of_the_users_in_place_of_one_of_megus_is_not_replaced(megu, finished):
    out = finished.parent / "run"
    content = user_files(finished.parent)["model.safetensors"]
    (out / "model.safetensors").write_bytes(content)
    assert states(finished)["finetune"] == "blocked"
    assert megu("run", "-c", finished).code == 2
    assert (out / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("name", ["model.safetensors", "runs.jsonl", "eval.json"])
def test_megu_writes_through_no_link_in_the_run_directory(megu, finished, name):
    out = finished.parent / "run"
    (out / name).rename(finished.parent / "elsewhere")
    (out / name).symlink_to(finished.parent / "elsewhere")
    before = (finished.parent / "elsewhere").read_bytes()
    for more in ([], ["--dry-run"]):
        answer = megu("run", "-c", finished, "--force", *more)
        assert answer.code == 2
        assert "symbolic link" in answer.err
    assert (finished.parent / "elsewhere").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("labels.safetensors", "model.safetensors")),
     "finetune.json", "similarity.json"],
)  # fmt: skip
def test_a_damaged_file_of_megus_is_rebuilt(megu, finished, name):
    out = finished.parent / "run"
    whole = (out / name).read_bytes()
    places = [0, 9, len(whole) // 2, len(whole) - 3]
    damaged = [bytes([*whole[:i], whole[i] ^ 1, *whole[i + 1 :]]) for i in places]
    damaged += [whole[:length] for length in (0, 5, 100, len(whole) // 3, len(whole) - 2)]
    for content in damaged:
        (out / name).write_bytes(content)
        answer = megu("run", "-c", finished)
        assert answer.code == 0, answer.err
        if name != "similarity.json":
            assert (out / name).read_bytes() == whole


def test_weights_whose_artifact_is_gone_are_known_by_the_log(megu, finished):
    out = finished.parent / "run"
    (out / "finetune.json").unlink()
    assert megu("run", "-c", finished).code == 0
    (out / "runs.jsonl").unlink()  # as an earlier version left them, and stale: the artifact names them
    assert megu("run", "-c", finished, "--set", "finetune.lr=0.03").code == 0
    (out / "runs.jsonl").unlink()
    (out / "finetune.json").unlink()
    answer = megu("run", "-c", finished)
    assert answer.code == 2
    assert "model.safetensors" in answer.err


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_users_checkpoint_in_the_run_directory_is_not_replaced(megu, finished, name):
    from safetensors.torch import load_file

    folder = finished.parent
    torch.save(load_file(folder / "run" / "original.safetensors"), folder / "mine.pth")
    out = folder / "new"
    out.mkdir()
    torch.save({"weights": torch.ones(5)}, out / name)
    before = (out / name).read_bytes()
    answer = megu("run", "-c", finished, "-o", out, "--set", f"model.checkpoint={folder / 'mine.pth'}",
                  "--set", "eval.oracle=false", "--set", "data.validation_from=train")  # fmt: skip
    assert answer.code == 2
    assert name in answer.err
    assert listing(out) == {name}
    assert (out / name).read_bytes() == before


def test_a_comparison_of_the_users_is_not_replaced(megu, finished):
    out = finished.parent / "run"
    for name in ("compare.json", "compare/0/mask.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": 1}')
        for more in ([], ["--dry-run"]):
            answer = megu("compare", "-c", finished, "--methods", "original,mask", *more)
            assert answer.code == 2
            assert name in answer.err
        assert (out / name).read_text() == '{"mine": 1}'
        (out / name).unlink()


def test_force_reads_every_file_again(megu, tmp_path, monkeypatch):
    from megu_cli.run import file_digests

    write_folder(tmp_path / "images", number=12)
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "images", "image_size": 8, "limit": None},
        forget={"classes": ["dog"]},
    )
    assert megu("train", "-c", file).code == 0
    read, seen = file_digests._read, []
    monkeypatch.setattr(file_digests, "_read", lambda path, inspect: seen.append(path) or read(path, inspect))
    assert megu("train", "-c", file).code == 0
    assert seen == []
    assert megu("train", "-c", file, "--force").code == 0
    assert len(seen) == len(list((tmp_path / "images").rglob("*.png")))
