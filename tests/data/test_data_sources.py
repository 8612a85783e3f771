"""The table of data sets: each row names a loader that is there, and everything that depends on a data set reads it."""

from __future__ import annotations

import importlib

import pytest
import torch

from megu_cli import data
from megu_cli.config import DataConfig
from megu_cli.config.datasets import DATA_SOURCES, DataSource
from megu_cli.data import builtin


@pytest.mark.parametrize("row", DATA_SOURCES.values(), ids=DATA_SOURCES)
def test_every_row_names_a_loader_and_one_deviation_for_each_mean(row):
    module, _, function = row.loader.partition(":")
    assert callable(getattr(importlib.import_module(f"megu_cli.data.{module}"), function))
    mean, deviation = row.normalisation
    assert len(mean) == len(deviation) in (1, 3)


def test_the_setting_takes_the_names_in_the_table():
    assert DataConfig.model_json_schema()["properties"]["name"]["enum"] == list(DATA_SOURCES)


def test_a_data_set_is_a_row_and_a_loader(monkeypatch, tmp_path):
    def halves(root):
        raw = builtin.digits(root)
        return builtin.replace(raw, superclasses={"low": list("01234"), "high": list("56789")})

    monkeypatch.setattr(builtin, "halves", halves, raising=False)
    row = DataSource("halves", "builtin:halves", ((0.25,), (0.5,)), lambda settings, out: iter([tmp_path]))
    monkeypatch.setitem(DATA_SOURCES, "halves", row)
    settings = DataConfig.model_construct(**{**DataConfig(name="digits").model_dump(), "name": "halves"})
    loaded = data.load(settings)
    assert loaded.classes == ["low", "high"]
    assert torch.equal(loaded.train.mean, torch.full((1, 1, 1), 0.25))
    assert torch.equal(loaded.train.std, torch.full((1, 1, 1), 0.5))
    assert loaded.root is None
