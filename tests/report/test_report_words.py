"""What the report says of a tiny run, without drawing: the request, the model, its files, the verdict and the mask."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megu_cli import report
from megu_cli.config import ForgetConfig
from megu_cli.evaluation.measure import described
from megu_cli.report.content import _numbers
from megu_cli.report.parts import View
from megu_cli.report.sections.judgement import _beside_the_mask
from megu_cli.request.resolve import resolve
from megu_cli.run import artifacts


def document(megu, file):
    assert megu("report", "-c", file, "--format", "json").code == 0
    return json.loads((file.parent / "run" / "report.json").read_text())


def test_the_request_and_the_model_by_name(megu, finished):
    found = document(megu, finished)
    facts = dict(found["facts"])
    assert facts["In the config"] == "forget.classes: 8"
    assert facts["Model"] == "small_cnn, trained by megu"
    assert facts["Forgotten training images"] == "42"


def test_the_verdict_in_words(megu, finished):
    found = document(megu, finished)
    judged = artifacts.read_body(finished.parent / "run" / "eval.json")["verdict"]
    assert found["verdict"] == judged["verdict"]
    section = found["sections"][0]
    assert section["title"] == "Verdict"
    assert judged["reason"] in section["lead"]
    assert len(section["tables"][0]["rows"]) == len(judged["checks"])
    assert megu("report", "-c", finished, "--format", "md").code == 0
    assert f"| Verdict | {judged['verdict']} |" in (finished.parent / "run" / "report.md").read_text()


def test_every_deployed_file_has_its_digest(finished):
    """The .pth that is deployed, and a directory for from_pretrained()."""
    run = finished.parent / "run"
    (run / "model").mkdir()
    written = {"model.pth": b"weights", "model/config.json": b"{}"}
    for name, content in written.items():
        (run / name).write_bytes(content)
    record = artifacts.read(run / "finetune.json")
    files = {name: artifacts.file_digest(run / name) for name in written}
    rows = report._files(run, {"finetune": artifacts.Artifact(record.body, meta={**record.meta, "files": files})})
    assert rows[:3] == [
        ("model.safetensors", *rows[0][1:]),
        ("model.pth", 7, files["model.pth"]),
        ("model/config.json", 2, files["model/config.json"]),
    ]
    others = {"model.safetensors", "original.safetensors", "oracle.safetensors", "finetune.json", "eval.json"}
    assert others <= {name for name, _, _ in rows}
    assert not set(written) & {name for name, _, _ in report._files(run, {})}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"classes": ["cat", 3]}, "forget.classes: cat, 3"),
        ({"samples": "/home/someone/private/list.csv"}, "forget.samples: list.csv"),
        ({"subjects": ["patient 7", "patient 9"]}, "forget.subjects: 2 listed"),
        ({"random": {"count": 40}}, "forget.random: count 40"),
    ],
)
def test_the_request_in_the_users_words_without_folders_and_people(settings, told):
    assert report._asked(ForgetConfig.model_validate(settings)) == told


def test_copies_are_told_apart_from_what_was_asked(toy):
    request = resolve(toy, classes=[toy.classes[0]], seed=0)
    assert "copies" not in described(toy, request)
    twice = SimpleNamespace(**{**vars(request), "copies": torch.cat([request.forget[:1], request.retain[:1]])})
    assert described(toy, twice)["copies"] == 1  # the copy in D_r stays
    assert _numbers({"forget": 41, "copies": 1}) == "41: 40 asked for, and 1 copy of these"
    assert _numbers({"forget": 1041, "copies": 2}) == "1,041: 1,039 asked for, and 2 copies of these"
    assert _numbers({"forget": 41}) == "41"


@pytest.mark.parametrize(
    ("now", "masked", "told"), [(0.05, 0.1, "than the masked one does"), (0.1, 0.05, "it is no forgetting")]
)
def test_the_report_says_whether_the_mask_is_nearer(now, masked, told):
    comparison = {"unlearned": {"js_divergence": now}, "mask": {"js_divergence": masked}}
    body = {"mask": {"probe_acc": 0.8}, "oracle": {"probe_acc": 0.5}, "comparison": comparison}
    text = _beside_the_mask(View(body, ["original", "mask", "unlearned", "oracle"], [], None))
    assert told in text
    assert f"JS divergence {now:.3f}, masked {masked:.3f}" in text
    assert ("80.0% of the images, retrained 50.0%" in text) is (masked < now)
    assert _beside_the_mask(View(body, ["original", "unlearned", "oracle"], [], None)) == ""
