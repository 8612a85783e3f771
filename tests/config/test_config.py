"""Defaults < preset < YAML < flags; paths; what `megu init` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import write_config

from megu_cli.config import Config, load_config
from megu_cli.config.templates import DEMO, template
from megu_cli.errors import ConfigError

DIGITS = {"name": "digits"}


def test_precedence(tmp_path):
    file = write_config(tmp_path, preset="paper", noise={"use": "positive"})
    config = load_config(file)
    assert (config.noise.use, config.noise.negative) == ("positive", "away")  # YAML over preset, preset over default
    assert config.finetune.reassign is False
    assert config.finetune.clean == 0
    assert config.labels.mode == "hard"
    config = load_config(file, ["noise.use=none", "noise.steps=9", "seed=3"], {"seed": 5, "device": None})
    assert (config.noise.use, config.noise.steps, config.seed, config.device) == ("none", 9, 5, "auto")
    assert load_config(write_config(tmp_path)).finetune.reassign is True


def test_paths_in_the_file_are_relative_to_it_and_in_flags_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = write_config(tmp_path / "a", out="b", model={"checkpoint": "w.pth"}, forget={"samples": "list.csv"})
    config = load_config(file, ["mllm.ratings=r.json"], {"out": None})
    assert config.out == tmp_path / "a" / "b"
    assert config.model.checkpoint == tmp_path / "a" / "w.pth"
    assert config.forget.samples == tmp_path / "a" / "list.csv"
    assert config.mllm.ratings == tmp_path / "elsewhere" / "r.json"
    assert load_config(file, [], {"out": Path("c")}).out == tmp_path / "elsewhere" / "c"


def test_a_value_may_hold_an_equals_sign_and_a_request_is_replaced_whole(tmp_path):
    config = load_config(write_config(tmp_path), ["forget.samples=a=b.csv"])
    assert config.forget.samples is not None
    assert config.forget.samples.name == "a=b.csv"
    assert config.forget.classes is None


def test_names_that_yaml_would_take_for_something_else(tmp_path):
    file = write_config(tmp_path)
    names = "no, yes, off, 001, 010, 0x1f, 1:30, 1_000, 2026-01-31"
    assert load_config(file, [f"forget.classes=[{names}]"]).forget.classes == names.split(", ")
    assert load_config(file, ["forget.classes=[7, '7']"]).forget.classes == [7, "7"]
    for wrong in ("3.0", "true", "null"):
        with pytest.raises(ConfigError, match=r"forget\.classes"):
            load_config(file, [f"forget.classes=[{wrong}]"])
    groups = load_config(file, ["data.superclasses={1: [0, 7], b: [no]}"]).data.superclasses
    assert groups == {"1": ["0", "7"], "b": ["no"]}
    assert load_config(file, ["eval.oracle=mine.pth"]).eval.own_oracle == Path.cwd() / "mine.pth"
    assert load_config(file, ["eval.oracle=off"]).eval.oracle is False
    # Where a truth value or a number is meant, they are still ones.
    config = load_config(file, ["eval.oracle=yes", "data.limit=1_000", "finetune.lr=1e-2", "noise.lr=.5"])
    assert (config.eval.oracle, config.data.limit, config.finetune.lr, config.noise.lr) == (True, 1000, 0.01, 0.5)


def test_a_section_that_is_missing_is_named(tmp_path):
    file = tmp_path / "megu.yaml"
    file.write_text("data: {name: digits}\nforget: {classes: [1]}\n")
    with pytest.raises(ConfigError, match="model: missing"):
        load_config(file)


def test_a_written_config_is_read_as_it_was_meant(tmp_path):
    names = [
        "no",
        "007",
        "1.5e3",
        "1.e5",
        "-.5",
        "+.5",
        "1e5",
        "1_0",
        "0x1f",
        ".inf",
        "2026-01-31",
        "null",
        "3.0",
        "-1",
    ]
    file = tmp_path / "megu.yaml"
    file.write_text(template(DIGITS, "small_cnn", None, names, None, None, None))
    assert load_config(file).forget.classes == names


@pytest.mark.parametrize("text", [DEMO, template(DIGITS, "small_cnn", None, ["8"], None, None, None),
                                  template(DIGITS, "small_cnn", "w.pth", None, "d.csv", None, None),
                                  template(DIGITS, "torchvision:resnet18", None, None, None, None, 0.03)])  # fmt: skip
def test_written_configs_are_valid(tmp_path, text):
    file = tmp_path / "megu.yaml"
    file.write_text(text)
    load_config(file)


def test_the_template_shows_every_setting_with_its_default(tmp_path):
    text = template(DIGITS, "small_cnn", None, ["8"], None, None, None)
    # Uncommenting everything must be a valid config again: no setting is misspelt or shown in another form.
    lines = [line.removeprefix("# ") for line in text.splitlines()[2:] if not line.startswith("   ")]
    forget = ("  subclasses:", "  samples:", "  random:")
    raw = yaml.safe_load("\n".join(line for line in lines if not line.startswith(forget)))
    config = Config.model_validate(raw)
    assert config.model_dump(exclude={"out"}) == Config(
        data={"name": "digits"}, model={"name": "small_cnn"}, forget={"classes": ["8"]}
    ).model_dump(exclude={"out"})


def test_init_writes_and_does_not_overwrite(megu, tmp_path):
    file = tmp_path / "new" / "megu.yaml"
    assert megu("init", "-c", file, "--data", "digits", "--model", "small_cnn", "--class", "8").code == 0
    assert load_config(file).forget.classes == ["8"]
    before = file.read_text()
    answer = megu("init", "-c", file)
    assert answer.code == 2
    assert "is there already" in answer.err
    assert file.read_text() == before
    assert megu("init", "-c", file, "--random", "0.1", "--class", "8").code == 2


def test_init_for_images_of_ones_own(megu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    (tmp_path / "list.csv").write_text("path,label\n")
    file = tmp_path / "runs" / "megu.yaml"
    for images, name, key in (("photos", "imagefolder", "root"), ("list.csv", "manifest", "manifest"),
                              ("saved", "hf_dataset", "root")):  # fmt: skip
        assert megu("init", "-c", "runs/megu.yaml", "--images", images, "--samples", "delete.csv", "--force").code == 0
        config = load_config(file)
        assert config.data.name == name
        assert getattr(config.data, key).resolve() == tmp_path / images
        assert config.forget.samples.resolve() == tmp_path / "delete.csv"
    assert megu("init", "-c", file, "--images", tmp_path / "photos", "--subject", "ann", "--force").code == 0
    told = megu("init", "-c", file, "--images", tmp_path / "photos", "--subject", "ann", "--force").out
    # What cannot be known from the images, and has no default that could be right.
    assert "data.image_size is for you to say" in told
    assert "mllm" in told
    assert load_config(file).data.image_size is None
    config = load_config(file)
    assert (config.data.root, config.forget.subjects) == (tmp_path / "photos", ["ann"])
    assert "neither a folder nor a CSV" in megu("init", "-c", file, "--images", "nowhere", "--force").err
    assert megu("init", "-c", file, "--images", "photos", "--data", "digits", "--force").code == 2


def test_a_flag_beside_the_request_leaves_the_request(tmp_path):
    file = write_config(tmp_path, forget={"classes": ["3"], "already": ["first"]})
    forget = load_config(file, ["forget.already=null", "forget.duplicates=warn"]).forget
    assert (forget.classes, forget.already, forget.duplicates) == (["3"], None, "warn")
    forget = load_config(file, ["forget.random.count=5"]).forget
    assert (forget.classes, forget.already) == (None, [tmp_path / "first"])
