from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megu_cli.mllm.agreement import compare

MINE = {"x": {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, "y": {"a": 1.0, "b": 2.0, "c": 3.0}, "z": {"a": 5.0}}


def test_spearman_in_closed_form() -> None:
    other = {"x": {"a": 1.0, "b": 3.0, "c": 2.0, "d": 9.0}, "y": {"a": 9.0, "b": 8.0, "c": 7.0, "k": 1.0}}
    found = compare(MINE, other)
    rows = {row["concept"]: row for row in found["rows"]}
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, -1, 0
    assert rows["x"]["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rows["y"]["spearman"] == pytest.approx(-1)
    assert rows["z"]["spearman"] is None
    assert [row["concept"] for row in found["rows"]] == ["y", "x", "z"]  # where they differ most, first
    assert rows["y"]["differences"][0] == {"candidate": "a", "here": 1.0, "there": 9.0}
    assert (rows["y"]["ratings"], rows["z"]["ratings"], found["ratings"]) == (3, 0, 7)


def test_equal_ratings_agree_and_constant_ones_have_no_correlation() -> None:
    same = compare(MINE, MINE)
    assert same["spearman"] == pytest.approx(1)
    assert all(not row["differences"] for row in same["rows"])
    assert compare(MINE, {"x": dict.fromkeys("abcd", 5.0)})["rows"][0]["spearman"] is None


def test_against_and_show(megu: Any, write_config: Any, tmp_path: Path) -> None:
    from PIL import Image

    file = write_config()
    code, out, _ = megu("similarity", "-c", file)
    assert code == 0
    written = tmp_path / "run" / "similarity.json"
    body = json.loads(written.read_text())
    body["scores"]["8"]["0"] = 10
    body["rater"] = "someone else"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({key: body[key] for key in ("classes", "scores", "rater")}))
    code, out, _ = megu("similarity", "-c", file, "--against", other, "--show")
    assert code == 0
    assert "someone else" in out
    assert "overall" in out
    assert "0: 5 / 10" in out
    code, out, _ = megu("similarity", "-c", file, "--against", written, "--json")
    assert json.loads(out)["against"]["spearman"] == pytest.approx(1)
    with Image.open(tmp_path / "run" / "similarity.png") as image:
        assert image.format == "PNG"
        image.load()
    code, _, err = megu("similarity", "-c", file, "--against", tmp_path / "nothing.json")
    assert code == 2
    assert "nothing.json" in err


def test_a_file_for_other_classes_says_so_and_one_that_is_none_is_refused_first(
    megu: Any, write_config: Any, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    code, _, err = megu("similarity", "-c", write_config(), "--against", bad)
    assert code == 2
    assert "bad.json" in err
    assert not (tmp_path / "run").exists()  # nothing was asked before
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"classes": ["cat", "dog"], "scores": {"cat": {"dog": 5}}, "rater": "me"}))
    code, out, _ = megu("similarity", "-c", write_config(), "--against", other)
    assert code == 0
    assert "rates none of these pairs" in " ".join(out.split())


def test_few_classes_are_named_and_a_missing_rating_is_told_from_the_own_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megu_cli.cli import tables

    scores = {"cat": {"dog": 7.25, "eel": 0.0}, "dog": {"cat": 6.0}}
    body = {"classes": ["cat", "dog", "eel"], "scores": scores, "rater": "x", "file": "f"}
    tables.similarity({"similarity": body, "transition": {"file": "t"}, "figure": "p"})
    out = capsys.readouterr().out
    assert "dog: 7.2, eel: 0" in out
    rows = [line.split() for line in out.splitlines()]
    for row in (["cat", "dog"], ["cat", "·", "6"], ["dog", "7", "·"], ["eel", "0", "?"]):
        assert row in rows


def test_the_matrix_of_a_hundred_classes_fits(capsys: pytest.CaptureFixture[str]) -> None:
    from megu_cli.cli import tables

    names = [f"class {i}" for i in range(100)]
    scores = {a: {b: float((i + j) % 11) for j, b in enumerate(names) if a != b} for i, a in enumerate(names)}
    body = {"classes": names, "scores": scores, "rater": "x", "file": "f"}
    tables.similarity({"similarity": body, "transition": {"file": "t"}, "figure": "p"})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert out.count("class 99 ") >= 3
