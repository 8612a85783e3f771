from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megu_cli.errors import DataError
from megu_cli.mllm.base import Question
from megu_cli.mllm.recorded import Recorded, shipped

GOOD: dict[str, Any] = {"classes": ["a", "b", "c"], "scores": {"a": {"b": 3, "c": 0.5}}, "rater": "me"}


def read(path: Path, content: Any) -> Recorded:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Recorded(path)


def test_ratings_and_where_they_come_from_are_handed_on(tmp_path: Path) -> None:
    more = {"date": "2026-01-01", "scale": [0, 10], "missing": {"a": ["d"]}, "notes": "by hand", "meta": {"x": 1}}
    ratings = read(tmp_path / "r.json", {**GOOD, **more}).rate([Question("a", ["b", "c", "d"], [])])
    assert (ratings.rater, ratings.scores) == ("me", {"a": {"b": 3.0, "c": 0.5}})
    assert ratings.provenance == {"date": "2026-01-01", "scale": [0, 10], "missing": {"a": ["d"]}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "object"),
        ("{", "json"),
        ("", "json"),
        ({}, "classes: field required; scores: field required; rater: field required"),
        ({**GOOD, "scores": []}, "scores: input should be an object"),
        ({**GOOD, "scores": {"a": [3, 5]}}, "scores / a: input should be an object"),
        ({**GOOD, "scores": {"a": {"b": 11}}}, r"scores / a / b: .* \(got 11\)"),
        ({**GOOD, "scores": {"a": {"b": -0.1}}}, r"scores / a / b: .* \(got -0.1\)"),
        ({**GOOD, "scores": {"a": {"b": "3"}}}, r"scores / a / b: .* \(got '3'\)"),
        ({**GOOD, "scores": {"a": {"b": True}}}, "scores / a / b: "),
        ({**GOOD, "scores": {"a": {"b": None}}}, "scores / a / b: "),
        ({**GOOD, "scores": {"a": {"b": float("nan")}}}, "NaN is no number"),
        ({**GOOD, "classes": "abc"}, "classes: "),
        ({**GOOD, "rater": None}, "rater: "),
        ({**GOOD, "missing": 5}, "missing: "),
    ],
)
def test_a_file_that_is_none_is_refused_and_the_place_named(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"(?s)recorded ratings .*r.json: .*{says}"):
        read(tmp_path / "r.json", content)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("nothing", ".", "bytes"):
        with pytest.raises(DataError, match="recorded ratings"):
            Recorded(tmp_path / name)


@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist"])
def test_shipped_ratings_rate_every_pair_and_say_who_gave_them(dataset: str) -> None:
    recorded = Recorded(shipped(dataset))
    names = recorded.classes
    questions = [Question(name, [other for other in names if other != name], []) for name in names]
    assert all(len(row) == len(names) - 1 for row in recorded.rate(questions).scores.values())
    assert recorded.rater
    assert {"date", "evidence", "question", "scale"} <= recorded.provenance.keys()


def test_data_without_shipped_ratings_are_told_the_ways_to_get_some() -> None:
    with pytest.raises(DataError) as error:
        shipped("imagefolder")
    for way in ("local", "endpoint", "clip", "mllm.ratings"):
        assert way in error.value.hint
