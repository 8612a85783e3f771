"""The table of model sources: each row names a class that is there, and what depends on a source reads the table."""

from __future__ import annotations

import importlib

import pytest
from conftest import write_config
from torch import nn

from megu_cli.config import load_config
from megu_cli.config.model_sources import MODEL_SOURCES, ModelSource, source_of
from megu_cli.errors import ConfigError
from megu_cli.models import networks, sources
from megu_cli.models.architecture import Architecture
from megu_cli.models.user_model import UserModel
from megu_cli.pipeline.remembered import evidence


@pytest.mark.parametrize("row", [*MODEL_SOURCES.values(), source_of("small_cnn")[0]], ids=lambda row: row.form)
def test_every_row_names_a_class_that_builds(row):
    module, _, kind = row.architecture.partition(":")
    found = getattr(importlib.import_module(f"megu_cli.models.{module}"), kind)
    assert issubclass(found, Architecture)
    assert found.build is not Architecture.build
    assert row.form.startswith(row.prefix)


def test_a_name_that_is_unknown_is_answered_with_all_forms():
    with pytest.raises(ConfigError) as caught:
        sources.check_name("nosuch:net")
    assert all(source.form in caught.value.hint for source in MODEL_SOURCES.values())


def test_a_model_source_is_a_row_and_a_class(monkeypatch, tmp_path):
    class Linear(Architecture):
        def build(self, classes, channels):
            return nn.Sequential(nn.Flatten(), nn.Linear(int(self.name.rpartition("/")[2]), classes))

        def channels(self):
            return 1

        def identity(self):
            return ["linear:", self.name.rpartition("/")[2]]

    monkeypatch.setattr(networks, "Linear", Linear, raising=False)
    weights = tmp_path / "weights"
    row = ModelSource(
        "linear:",
        "linear:NUMBER",
        "networks:Linear",
        placed=lambda name, place: True,
        trained=lambda name: True,
        files=lambda name, out: iter([str(weights)]),
    )
    monkeypatch.setitem(MODEL_SOURCES, row.prefix, row)
    config = load_config(write_config(tmp_path, model={"name": "linear:64"}))
    assert config.model.name == f"linear:{tmp_path / '64'}"
    assert config.model.trained
    assert sources.build(config.model.name, 7, 1)[1].out_features == 7
    assert sources.channels_of(config.model.name) == 1
    assert sources.shown(config.model.name) == "linear:64"
    assert UserModel(config.model, config.data).architecture == {"model": ["linear:", "64"]}
    before = evidence(config)
    weights.write_text("new")
    assert evidence(config) != before
