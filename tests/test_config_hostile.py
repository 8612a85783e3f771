"""Configs that were written to do harm, or by mistake: one short message, and exit code 2."""

from __future__ import annotations

import pytest

from megu_cli.config import load_config
from megu_cli.errors import ConfigError

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
