"""The published JSON schemas: current, and true of what megu reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from megu_cli.config import load_config
from megu_cli.config.json_schema import MODELINE, SCHEMA_FILE, json_schema, schema_text
from megu_cli.config.templates import DEMO, template
from megu_cli.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "docs" / "schemas"
CONFIGS = sorted(
    path
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.yaml")
    if path.name != "dvc.yaml" and not {"runs", ".dvc"} & set(path.relative_to(ROOT).parts)
)


def checked(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_current(megu):
    assert megu("schema").out == schema_text()
    assert (SCHEMAS / "config.json").read_text(encoding="utf-8") == schema_text(), (
        "write it anew: megu schema > docs/schemas/config.json"
    )


def test_every_setting_is_described():
    schema = json_schema()
    for name, section in {"": schema, **schema["$defs"]}.items():
        for key, setting in section["properties"].items():
            assert "$ref" in json.dumps(setting) or setting.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_each_config_names_the_schema_and_fits_it(file):
    text = file.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith(MODELINE)
    assert (file.parent / first.removeprefix(MODELINE)).resolve() == SCHEMAS / "config.json"
    checked("config.json").validate(yaml.safe_load(text))


@pytest.mark.parametrize("text", [DEMO, template({"name": "digits"}, "small_cnn", None, ["8"], None, None, None)])
def test_what_is_written_names_the_schema_beside_it_and_fits_it(text):
    assert text.splitlines()[0] == f"{MODELINE}{SCHEMA_FILE}"
    checked("config.json").validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("settings", "valid"),
    [
        ({}, True),
        ({"model": {"name": "small_cnn", "classes": [7, "cat"]}}, True),
        ({"forget": {"classes": ["8", 3]}}, True),
        ({"forget": {"samples": "delete.csv"}}, True),
        ({"mllm": {"key_env": "MY_KEY"}}, True),
        ({"nosie": {"steps": 3}}, False),
        ({"noise": {"step": 3}}, False),
        ({"noise": {"steps": "many"}}, False),
        ({"noise": {"steps": 0}}, False),
        ({"data": {"name": "mnist"}}, False),
        ({"model": {"checkpoint": "w.pth"}}, False),
        ({"mllm": {"key_env": 3}}, False),
    ],
)
def test_the_schema_and_megu_agree(tmp_path, settings, valid):
    config = {"data": {"name": "digits"}, "model": {"name": "small_cnn"}, "forget": {"classes": ["8"]}, **settings}
    file = tmp_path / "megu.yaml"
    file.write_text(yaml.safe_dump(config))
    assert checked("config.json").is_valid(config) is valid
    if valid:
        load_config(file)
    else:
        with pytest.raises(ConfigError):
            load_config(file)


def test_init_writes_the_schema_beside_the_config(megu, tmp_path):
    answer = megu("init", "-c", tmp_path / "megu.yaml", "--data", "digits", "--class", "8")
    assert answer.code == 0
    assert SCHEMA_FILE in answer.out
    schema = tmp_path / SCHEMA_FILE
    assert schema.read_text(encoding="utf-8") == schema_text()
    schema.write_text(json.dumps({"title": "megu.yaml"}))  # of another version
    assert megu("init", "-c", tmp_path / "megu.yaml", "--data", "digits", "--class", "8", "--force").code == 0
    assert schema.read_text(encoding="utf-8") == schema_text()
    schema.write_text('{"title": "mine"}')
    answer = megu("init", "-c", tmp_path / "other.yaml", "--data", "digits", "--class", "8")
    assert answer.code == 2
    assert "was not written by megu" in answer.err
    assert schema.read_text() == '{"title": "mine"}'
    assert not (tmp_path / "other.yaml").exists()


def test_validate_checks_the_config_alone(megu, tmp_path):
    file = tmp_path / "megu.yaml"
    file.write_text("data: {name: imagefolder, root: nowhere}\nmodel: {name: small_cnn}\nforget: {classes: [cat]}\n")
    answer = megu("validate", "-c", file)
    assert (answer.code, answer.out) == (0, f"{file}: valid\n")
    assert megu("validate", "-c", file, "--json").json == {"config": str(file), "valid": True}
    for fault, told in (
        ("noise.step=3", "did you mean steps?"),
        ("seed=-1", "seed"),
        ("eval.require=[nothing<=1]", "there is no metric nothing"),
    ):
        answer = megu("validate", "-c", file, "--set", fault)
        assert answer.code == 2
        assert answer.out == ""
        assert told in answer.err
    assert megu("validate", "-c", tmp_path / "none.yaml").code == 2


def test_evaluation_and_finetuning_fit_their_schemas(finished):
    run = finished.parent / "run"
    for name in ("eval.json", "finetune.json"):
        document = json.loads((run / name).read_text(encoding="utf-8"))
        checked(name).validate(document)
        for fault in (
            {key: value for key, value in document.items() if key != "meta"},
            {**document, "meta": {**document["meta"], "stage": "noise"}},
            {**document, "unlearned": {"forget_test_acc": "low"}, "loss": ["high"]},
        ):
            assert not checked(name).is_valid(fault)


def test_comparison_fits_its_schema(megu, finished):
    variant = ["--set", "compare.variants={no-noise: {noise.use: none}}"]
    assert megu("compare", "-c", finished, "--methods", "megu,mask", "--seeds", "1", "-q", *variant).code == 0
    document = json.loads((finished.parent / "run" / "compare.json").read_text(encoding="utf-8"))
    checked("compare.json").validate(document)
    assert not checked("compare.json").is_valid({**document, "methods": {"megu": {}}})
    row = document["methods"]["no-noise"]
    assert row["variant_of"] == "megu"
    wrong = {**document["methods"], "no-noise": {**row, "variant_of": 1}}
    assert not checked("compare.json").is_valid({**document, "methods": wrong})


def test_what_the_schemas_describe_is_there(finished):
    """A description of a key that no artifact has any more would mislead."""
    run = finished.parent / "run"
    for name, rare in (
        ("eval.json", {"retrained_by"}),
        ("finetune.json", {"reinitialised", "checkpoint", "retrained_by"}),
    ):
        described = set(json.loads((SCHEMAS / name).read_text(encoding="utf-8"))["properties"])
        assert described - rare == set(json.loads((run / name).read_text(encoding="utf-8")))
