"""How figures are drawn: their looks, and SVG that is the same bytes for the same data."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Look:
    """How a figure is to look.

    Attributes:
        dark: Drawn for a dark page.
        narrow: Drawn for a phone.
    """

    dark: bool = False
    narrow: bool = False

    @property
    def ink(self) -> str:
        """Of text."""
        return "#e8eaf0" if self.dark else "#1c2230"

    @property
    def faint(self) -> str:
        """Of what is not the point."""
        return "#8b93a7" if self.dark else "#7b8397"

    @property
    def line(self) -> str:
        """Of grids and frames."""
        return "#39415a" if self.dark else "#d9dde7"

    @property
    def page(self) -> str:
        """Of the panel that the figure lies on."""
        return "#171c28" if self.dark else "#ffffff"

    @property
    def forgotten(self) -> str:
        """Of what is forgotten."""
        return "#ff9d5c" if self.dark else "#d2521a"

    @property
    def palette(self) -> list[str]:
        """For the classes that matter, most important first; apart from `forgotten` also for the colour-blind."""
        if self.dark:
            return ["#6cb6ff", "#58d3b0", "#c9a2ff", "#f0d060", "#ff8fb8", "#9fd86b", "#8fd7ef", "#c7b299"]
        return ["#2467c9", "#0f8a6a", "#7a46c2", "#b38600", "#c2377a", "#4f8a10", "#1187a8", "#8a6f4e"]

    @property
    def width(self) -> float:
        """Inches."""
        return 3.7 if self.narrow else 9.4


WIDE_LIGHT = Look()


@dataclass(frozen=True)
class Drawn:
    """A figure as the page holds it.

    Attributes:
        uri: ``data:`` address of the SVG.
        width: CSS pixels.
        height: CSS pixels.
    """

    uri: str
    width: int
    height: int


def drawn(draw: Callable[[Look], Figure], look: Look) -> Drawn:
    """Draw a figure in one look; the same data give the same bytes."""
    style: Any = {
        "svg.hashsalt": "megu",
        "svg.fonttype": "path",
        "text.parse_math": False,  # a dollar sign in a name begins no formula
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9 if look.narrow else 10,
        "text.color": look.ink,
        "axes.edgecolor": look.line,
        "axes.labelcolor": look.ink,
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "axes.titlecolor": look.ink,
        "xtick.color": look.faint,
        "ytick.color": look.ink,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with mpl.rc_context(style):
        figure = draw(look)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, dpi=160)
    inches = figure.get_size_inches()
    uri = "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
    return Drawn(uri, round(96 * float(inches[0])), round(96 * float(inches[1])))


def bare(axes: Axes) -> None:
    """Remove frame and ticks."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
