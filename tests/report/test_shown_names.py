"""Names of others are shown, never obeyed."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from PIL import Image

from megu_cli.cli import tables
from megu_cli.cli.options import Options
from megu_cli.report.content import gather
from megu_cli.text import markdown, printable, shown

NAMES = ["\x1b[2J", "\x9b31m", "a\u202eb", "a\u200bb", "\udcff", "a\rb"]


@pytest.mark.parametrize("name", NAMES)
def test_what_steers_a_terminal_is_escaped(name, capsys):
    from megu_cli.cli.console import SafeConsole, say

    assert printable(name).isprintable()
    SafeConsole().print(name, markup=False)
    say(name)
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


@pytest.mark.parametrize("name", ["<script>", "![](http://a.example/x.png)", "a|b", "`<b>`", "``<b>"])
def test_markdown_of_a_name_is_text(name):
    shown = markdown(name)
    assert "<" not in shown
    assert "![" not in shown
    assert markdown("see `megu purge`") == "see `megu purge`"


HOSTILE = "[red]x\x1b[2J\nforged: met"


def test_names_are_in_one_line_and_stay_apart():
    assert shown({"a\nb": ["a\\nb", "a\nb"], "reason": "two\nlines", "n": 1}) == {
        "a\\nb": ["a\\nb'", "a\\nb"],
        "reason": "two\nlines",
        "n": 1,
    }


@pytest.mark.parametrize(
    ("table", "result"),
    [
        (tables.purge, {"deleted": {HOSTILE: "what"}, "report": "", "kept": [HOSTILE], "dry_run": True}),
        (tables.status, {"stages": {"train": {"status": "fresh", "reason": "", "file": HOSTILE}}}),
        (
            tables.similarity,
            {
                "similarity": {
                    "scores": {HOSTILE: {"a": 1.0}}, "classes": ["a", HOSTILE], "rater": HOSTILE, "file": HOSTILE,
                },
                "transition": {"file": HOSTILE},
                "figure": HOSTILE,
            },
        ),
        (lambda result: tables.where_next(result["folder"]), {"folder": HOSTILE}),
    ],
)  # fmt: skip
def test_tables_show_names_as_they_are(capsys, table, result):
    from megu_cli.cli.commands.shared import display

    display(Options(), result, table)
    out = capsys.readouterr().out
    assert "[red]x\\x1b[2J" in out
    assert not any(line.startswith("forged") for line in out.splitlines())
    assert all(line.isprintable() for line in out.split("\n"))
    display(Options(json=True), result, table)
    assert json.loads(capsys.readouterr().out) == result  # exact


@pytest.mark.parametrize("arguments", [("run", "--\x1b[2J"), ("\x1b[2J[red]",), ("run", "-v", "-c", "no\x1b[2J.yaml")])
def test_what_the_command_line_quotes_is_escaped(megu, arguments):
    answer = megu(*arguments)
    assert answer.code == 2
    assert "\\x1b[2J" in answer.err
    assert all(line.isprintable() for line in answer.err.split("\n"))


def test_pages_and_pictures_hold_no_control_characters(tmp_path):
    from megu_cli.mllm.heatmap import draw
    from megu_cli.report import _environment

    page = _environment().from_string("{{ name }} {{ name | coded }}").render(name=HOSTILE)
    assert "\x1b" not in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a character that has no picture
        draw({"scores": {HOSTILE: {"a": 1.0}}, "classes": ["a", HOSTILE], "rater": HOSTILE}, tmp_path / "x.png")


@pytest.mark.slow
def test_a_report_of_hostile_names(finished):
    """Class 3 is called otherwise in all that the report is made from; each page holds the name escaped."""
    from megu_cli import report
    from megu_cli.config import load_config
    from megu_cli.pipeline.context import RunContext
    from megu_cli.run import artifacts

    work = RunContext.open(load_config(finished))
    sources = report._sources(work, (), False, ())
    body = json.loads(json.dumps(sources.evaluation.body).replace('"3"', json.dumps(HOSTILE)))
    named = report._readable(replace(sources, evaluation=artifacts.Artifact(body, meta=sources.evaluation.meta)))
    for form in ("html", "md"):
        text = report._RENDER[form](gather(named))
        assert "\x1b" not in text
        assert not any(line.startswith("forged") for line in text.splitlines())
        assert "forged: met" in text


def test_a_long_name_is_no_large_picture(tmp_path):
    from megu_cli.mllm.heatmap import draw

    long, rater = "x" * 50_000, "r" * 50_000
    body = {"classes": [long, "b"], "scores": {long: {"b": 3.0}}, "rater": rater}
    width, height = Image.open(draw(body, tmp_path / "picture.png")).size
    assert max(width, height) < 2_000
