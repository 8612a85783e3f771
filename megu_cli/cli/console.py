"""The one way to the terminal: nothing that steers it gets there but from rich itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from megu_cli.text import printable


class SafeConsole(Console):
    """A console that shows control characters of names escaped, and takes no text for markup: styles come as `Text`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Escape before the layout, so that columns fit."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape whatever came in another way."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def output() -> Console:
    """Return the console for results on stdout."""
    # A pipe has no width of its own: leave lines whole there.
    console = SafeConsole(highlight=False)
    return console if console.is_terminal else SafeConsole(highlight=False, width=120)


def say(line: str, err: bool = False) -> None:
    """Print a line, on stdout or stderr."""
    typer.echo(printable(line), err=err)
