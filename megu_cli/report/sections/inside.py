"""What the outputs and the inner features show: losses, entropies, planes, entanglement."""

from __future__ import annotations

from typing import Any

import numpy as np

from megu_cli.evaluation.registry import metrics
from megu_cli.report import figures
from megu_cli.report.parts import Figure, Section, Table, View
from megu_cli.report.words import title


def _middle(told: dict[str, Any]) -> str:
    """Median of a log histogram, as the bin that holds it."""
    counts = np.cumsum(told["counts"])
    if not counts[-1]:
        return "–"
    place = int(np.searchsorted(counts, counts[-1] / 2))
    step = (told["high"] - told["low"]) / len(told["counts"])
    low, high = (10 ** (told["low"] + step * (place + i)) for i in (0, 1))
    if place == 0:
        return f"below {high:.2g}"
    if place == len(told["counts"]) - 1:
        return f"above {low:.2g}"
    return f"{low:.2g} – {high:.2g}"


def histograms(view: View) -> Section | None:
    """Loss and entropy of forgotten, retained and unseen images."""
    told = view.body.get("aggregates", {}).get("histograms")
    if not told:
        return None
    images = view.body["aggregates"]["images"]
    rows = [
        [view.names[m], group, f"{images[group]:,}", _middle(of["loss"]), _middle(of["entropy"])]
        for m, groups in told.items()
        for group, of in groups.items()
    ]
    lead = (
        "A model is sure of what it was trained on: its loss there is small, to the left. The forgotten images should "
        "no longer stand with the retained ones, but where images stand that it has never seen."
    )
    detail = (
        "Share of images by cross-entropy loss and by output entropy, both in nats on a logarithmic axis with "
        "open ends. Unseen are test images of the classes that the forgotten images belong to. "
        "The figures are counts over groups of images; none belongs to a single one."
    )
    alt = "Histograms of loss and entropy. Median loss: " + "; ".join(f"{r[0]}, {r[1]}: {r[3]}" for r in rows) + "."
    figure = Figure(lambda look: figures.histograms(told, view.names, look), alt)
    table = Table(["model", "images", "number", "median loss", "median entropy"], rows, folded="Medians as a table")
    return Section("attack", "How sure the model is", lead, detail, [figure], [table])


def planes(view: View) -> Section | None:
    """Classes in the plane of inner features before and after."""
    told = view.body.get("aggregates", {}).get("plane")
    if not told:
        return None
    labels = np.array(told["labels"])
    points = {m: np.array(told[m]) for m in ("original", "unlearned", "oracle") if m in told}
    near = list(view.near())
    drawn = [c for c in range(len(view.classes)) if (labels == c).any()]
    focus = [*view.forgotten, *near] or drawn[:8]
    rows = []
    for c in focus:
        cells = []
        for flat in points.values():
            means = {k: flat[labels == k].mean(0) for k in drawn}
            others = {k: np.linalg.norm(means[c] - means[k]) for k in drawn if k != c} if c in means else {}
            nearest = min(others, key=lambda k: others[k]) if others else None
            cells.append("–" if nearest is None else f"{view.classes[nearest]} ({others[nearest]:.2f})")
        rows.append([view.classes[c], *cells])
    lead = (
        "How the model arranges unseen images inside, flattened to a plane: classes that mix cannot be told apart. "
        + (
            "A class that was forgotten dissolves among its neighbours; one that still stands apart may be hidden "
            "rather than forgotten."
            if view.forgotten
            else "Kept classes should stay as they were."
        )
    )
    detail = (
        "Penultimate features of test images (no forgotten image is among them), on the two principal components of "
        "the class means, each model by itself, turned onto the original's. A plane shows only part of the distances: "
        "the linear probe in the table above measures all of them."
    )
    alt = "Nearest neighbour of each class in the plane. " + "; ".join(
        f"{r[0]}: " + ", ".join(f"{view.names[m]} {cell}" for m, cell in zip(points, r[1:], strict=True)) for r in rows
    ) + "."  # fmt: skip
    names = view.names
    figure = Figure(lambda look: figures.planes(points, labels, view.classes, view.forgotten, near, names, look), alt)
    head = ["class", *(f"nearest class, {view.names[m]}" for m in points)]
    tables = [Table(head, rows, folded="Nearest classes as a table"), *_entangled(view)]
    return Section("entanglement", "How classes lie inside the model", lead, detail, [figure], tables)


def _entangled(view: View) -> list[Table]:
    """The same in numbers that no plane distorts."""
    measured: dict[str, dict[str, float | None]] = view.body.get("entanglement", {})
    models = [m for m in view.models if m in measured and m != "mask"]  # masking moves no feature

    rows = [
        [f"{title(m.name)}\n{m.plain}\n{m.name}", *(m.text(measured[name].get(m.name)) for name in models)]
        for m in metrics("entanglement", "report")
    ]
    return [Table(["", *(view.names[m] for m in models)], rows, bold=1 + models.index("unlearned"))] if models else []
