"""Names of others are shown, never obeyed."""

from __future__ import annotations

import pytest

from megu_cli.text import markdown, printable

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
