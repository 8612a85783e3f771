"""The entry of a metric in the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Where eval.json holds a metric: with a model's own figures, or in one of its sections.
Group = Literal["model", "comparison", "entanglement", "time"]
Unit = Literal["percent", "number", "epochs"]
# Where a metric shows: `megu eval`'s table, the report, requirements, and the paired differences of compare.json.
Place = Literal["table", "report", "require", "paired"]
EVERYWHERE: tuple[Place, ...] = ("table", "report", "require", "paired")


class NotApplicable(Exception):  # noqa: N818
    """Raised by a metric's function if the metric has no meaning for this request or model: it gets no entry."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Its key in JSON files and requirements.
        label: Row of the terminal table.
        function: Computes it, as a function or as ``module:function`` of this package. Its argument is the
            `measure.Measurement` of the model. In the group ``comparison`` a second argument is the oracle's
            `measure.Measurement`. ``None``: computed elsewhere.
        group: Where eval.json holds it.
        target: The best value: the oracle's own (``oracle``), or a number. ``None``: there is no best value.
        unit: How a value is shown.
        title: Row of the report; the label if empty.
        plain: One sentence for a reader of the report.
        definition: For docs/metrics.md.
        images: The images that it is measured on, for docs/metrics.md.
        source: Where it comes from, for docs/metrics.md.
        target_text: The target in docs/metrics.md, if it needs more words.
        needs: What it cannot be measured without.
        column: Head of its column in `megu compare`'s table; empty: no column.
        interval: Computes its 95% interval, in the same way as ``function``.
        places: Where it shows.
    """

    name: str
    label: str
    function: Callable[..., float | None] | str | None = None
    group: Group = "model"
    target: float | Literal["oracle"] | None = "oracle"
    unit: Unit = "percent"
    title: str = ""
    plain: str = ""
    definition: str = ""
    images: str = ""
    source: str = ""
    target_text: str = ""
    needs: str = ""
    column: str = ""
    interval: Callable[..., tuple[float, float] | None] | str | None = None
    places: tuple[Place, ...] = EVERYWHERE

    @property
    def direction(self) -> str:
        """Which value is better, in words."""
        if self.target is None:
            return "described only"
        return {"oracle": "nearer to the oracle's", 0.0: "lower", 1.0: "higher"}.get(
            self.target, "nearer to the target"
        )

    def text(self, value: float | None, digits: int = 2, sign: str = "") -> str:
        """A value as people read it; ``sign`` follows a percentage."""
        if value is None:
            return "–"
        if self.unit == "percent":
            return f"{100 * value:.{digits}f}{sign}"
        return f"{value:g}" if self.unit == "epochs" else f"{value:.3f}"
