"""Write the tables of docs/metrics.md from the registry of metrics: `python docs/metrics_tables.py [--check]`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from megu_cli.evaluation.registry import Group, Metric, metrics

PAGE = Path(__file__).with_name("metrics.md")
COLUMNS: dict[Group, tuple[str, ...]] = {
    "model": ("name", "definition", "images", "target", "source"),
    "comparison": ("name", "definition", "target"),
    "entanglement": ("name", "definition"),
    "time": ("name", "definition"),
}


def cell(metric: Metric, column: str) -> str:
    """The text of a metric in one column."""
    if column == "name":
        return f"`{metric.name}`"
    if column == "target":
        target = {"oracle": "the oracle's", None: "—"}.get(metric.target)  # type: ignore[call-overload]
        return metric.target_text or str(target or f"{metric.target:g}")
    return str(getattr(metric, column))


def table(group: Group) -> str:
    """The table of one group of metrics."""
    columns = COLUMNS[group]
    rows = [[cell(metric, column) for column in columns] for metric in metrics(group)]
    lines = [list(columns), ["---"] * len(columns), *rows]
    text = "\n".join("|" + "|".join(f" {text} " if text != "---" else text for text in line) + "|" for line in lines)
    return text.replace("|  |", "| |")


def page(text: str) -> str:
    """The page with current tables between its markers."""
    for group in COLUMNS:
        pattern = re.compile(rf"(<!-- metrics: {group} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, group=group: match[1] + table(group) + "\n" + match[2], text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if "--check" in sys.argv[1:] and new != old:
        sys.exit("docs/metrics.md is not current: run python docs/metrics_tables.py")
    PAGE.write_text(new, encoding="utf-8")
