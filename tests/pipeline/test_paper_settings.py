"""Settings that follow the paper, or take another source than its: the stages that they change, and no others."""

from __future__ import annotations

from conftest import write_config

from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.freshness import Freshness


def keys(folder, **sections):
    """Stage -> the settings in its key."""
    context = RunContext.open(load_config(write_config(folder, **sections)))
    stages = Freshness(context).stages.values()
    return {s.name: context.inputs.settings([*s.settings, *s.by_config(context.config)[0]]) for s in stages}


def test_a_noise_alone_changes_the_key_of_the_noise_and_the_default_none(tmp_path):
    added, alone = keys(tmp_path), keys(tmp_path, noise={"input": "alone"})
    assert [name for name in added if added[name] != alone[name]] == ["noise"]
    assert alone["noise"] == {**added["noise"], "noise.input": "alone"}
    assert "noise.input" not in added["noise"]  # artifacts of earlier versions stay fresh
