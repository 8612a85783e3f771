"""The table of raters: each row names a class that can be made, and everything that depends on a rater reads it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from megu_cli.config import Config, MLLMConfig
from megu_cli.config.raters import RATERS, RaterKind
from megu_cli.errors import ConfigError
from megu_cli.mllm.backends import Setup, backend
from megu_cli.mllm.base import Cost, Ratings
from megu_cli.pipeline.inputs import INPUTS


def setup(settings: MLLMConfig, folder: Path) -> Setup:
    return Setup(
        settings,
        ratings=lambda: folder / "ratings.json",
        identity=lambda: "digest",
        answers=folder / "answers.jsonl",
        show=lambda position: pytest.fail("an image was shown"),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("row", RATERS.values(), ids=RATERS)
def test_every_row_names_a_class_settings_and_inputs(row, tmp_path):
    (tmp_path / "ratings.json").write_text('{"classes": [], "scores": {}, "rater": "me"}')
    settings = MLLMConfig(backend=row.name, model="m", base_url="http://localhost:1/v1")
    made = backend(setup(settings, tmp_path))
    assert type(made).__name__ == row.backend.partition(":")[2]
    named, inputs = row.depends_on("auto")
    assert {key.removeprefix("mllm.") for key in named} <= MLLMConfig.model_fields.keys()
    assert {*inputs} <= INPUTS.keys()
    assert ("forget" in inputs) == row.asks


def test_the_setting_takes_the_names_in_the_table():
    values = MLLMConfig.model_json_schema()["properties"]["backend"]["enum"]
    assert values == ["auto", *RATERS]


def test_a_rater_that_is_not_in_the_table_is_refused(tmp_path):
    settings = MLLMConfig.model_construct(**{**MLLMConfig().model_dump(), "backend": "oracle", "model": "m"})
    with pytest.raises(ConfigError, match="there is no rater 'oracle'") as caught:
        backend(setup(settings, tmp_path))
    assert "clip" in caught.value.hint


def test_a_rater_is_a_row_and_a_class(tmp_path, monkeypatch):
    class Same:
        """Rates all classes alike."""

        @classmethod
        def of(cls, given: Setup) -> Same:
            return cls()

        def cost(self, questions):
            return Cost(answered=len(questions))

        def rate(self, questions):
            return Ratings("same", {q.concept: dict.fromkeys(q.candidates, 5.0) for q in questions}, {})

    monkeypatch.setattr(importlib.import_module("megu_cli.mllm.unrated"), "Same", Same, raising=False)
    monkeypatch.setitem(
        RATERS, "same", RaterKind("same", "unrated:Same", "alike", asks=False, settings=("mllm.dtype",))
    )
    settings = MLLMConfig.model_construct(**{**MLLMConfig().model_dump(), "backend": "same"})
    assert isinstance(backend(setup(settings, tmp_path)), Same)
    from megu_cli.pipeline.stages import STAGES

    config = Config.model_construct(mllm=settings)
    assert STAGES["similarity"].by_config(config) == (("mllm.dtype",), ())
