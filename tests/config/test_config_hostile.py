"""Configs that were written to do harm, or by mistake: one short message, and exit code 2."""

from __future__ import annotations

import pytest

from megu_cli.config import load_config
from megu_cli.errors import ConfigError, DataError
from megu_cli.mllm.recorded import Recorded
from megu_cli.models.class_names import read_names

BASE = "data: {name: digits}\nmodel: {name: small_cnn}\nforget: {classes: ['8']}\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: !!int x", "line 4"),
        ("seed: !!float x", "not a value of type float"),
        ("seed: !!timestamp x", "not a value of type timestamp"),
        ("seed: " + "9" * 5000, "not a value of type int"),
        ("forget: {classes: ['3']}", "lines 3 and 4"),
        ("noise:\n  steps: 3\n  steps: 4", "lines 5 and 6"),
        (LAUGHS, "aliases are not read"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("out: ~nosuchuser/x", "out: '~nosuchuser/x': there is no such user"),
        ('out: "a\\0b"', "holds a NUL"),
        ("out: " + "a" * 5000, "too long a path"),
    ],
)
def test_a_config_at_fault_is_refused_in_few_words(tmp_path, text, part):
    file = tmp_path / "megu.yaml"
    file.write_text(f"{BASE}{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert part in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "setting", ["seed=!!int x", "seed=" + "9" * 5000, "noise={steps: 3, steps: 4}", "data.limit=" + "x" * 5000]
)
def test_a_setting_at_fault_is_refused_in_few_words(tmp_path, setting):
    file = tmp_path / "megu.yaml"
    file.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load_config(file, [setting])
    assert setting.partition("=")[0] in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("command", "option"),
    [("init", "--config"), ("init", "--images"), ("demo", "--out"), ("run", "--out"), ("similarity", "--against")],
)
def test_a_path_that_cannot_be_is_refused_by_its_option(megu, tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    answer = megu(command, option, "a" * 5000)
    assert answer.code == 2
    assert f"error: {option}: " in answer.err
    assert "too long a path" in answer.err
    assert len(answer.err) < 1000


def test_the_seeds_of_a_comparison_are_bounded(megu, config):
    answer = megu("compare", "-c", config, "--seeds", "9" * 20, "--dry-run")
    assert answer.code == 2
    assert "compare.seeds: input should be less than or equal to 1000" in answer.err


RATINGS = '{"classes": ["a"], "rater": "me", "scores": {"a": {"b": 5}}, "date": 0}'


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("0}", "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("0}", "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ("0}", '0, "date": 1}', "the key 'date' stands there twice"),
        ("5}", '5, "b": 6}', "the key 'b' stands there twice"),
        ("5}", "9" * 5000 + "}", "a number of 5,000 digits"),
        ("5}", "1e999}", "not JSON compliant"),
        ("5}", "NaN}", "NaN is no number"),
        ("5}", f'"{"x" * 50_000}"}}', "scores / a / b: input should be a valid number"),
        ('"me"', '"\\ud800"', "half a character"),
    ],
)
def test_ratings_at_fault_are_refused_in_few_words(tmp_path, old, new, part):
    file = tmp_path / "ratings.json"
    file.write_text(RATINGS.replace(old, new))
    with pytest.raises(DataError) as caught:
        Recorded(file)
    assert part in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 0, "a": 1}', "stands there twice"),
        ('{"a": 0, "b": 5}', "the positions are not 0, 1, 2"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('[["a"]]', "something other than names"),
        ("3", "something other than names"),
    ],
)
def test_class_lists_at_fault_are_refused_in_few_words(tmp_path, text, part):
    file = tmp_path / "classes.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_names(file)
    assert part in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "override", ["forget.classes=[Q]", "model.name=Q", "model.name=torchvision:Q", "data.root=Q", "Q"]
)
def test_long_values_are_cut_where_messages_quote_them(megu, config, override):
    answer = megu("run", "-c", config, "--set", override.replace("Q", "q" * 50_000))
    assert answer.code == 2
    assert len(answer.err) < 3000
