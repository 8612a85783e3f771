"""What the forgetting was made with: ratings, transition matrix and noises."""

from __future__ import annotations

from typing import Any

import numpy as np

from megu_cli.report import figures
from megu_cli.report.parts import Figure, Section, Table, View
from megu_cli.report.words import listed, percent


def similarity(view: View) -> Section | None:
    """The ratings and the transition matrix."""
    ratings = view.ratings
    similarity = view.sources.artifacts.get("similarity")
    if not ratings or similarity is None:
        return None
    transition = view.sources.artifacts.get("transition")
    weights: dict[str, dict[str, float]] = {}
    if transition is not None:
        values = transition.tensors["transition"].tolist()
        for row, line in zip(transition.body["rows"], values, strict=True):
            weights[row] = dict(zip(transition.body["columns"], line, strict=True))
    rows = list(ratings)
    best = {c: max(row.get(c, 0.0) for row in ratings.values()) for row in ratings.values() for c in row}
    columns = [c for c in similarity.body["classes"] if c in best]
    if len(columns) > 12:
        columns = sorted(columns, key=lambda c: -best[c])[:12]
    drawn = rows[:12]
    grid = np.array([[ratings[r].get(c, np.nan) for c in columns] for r in drawn])
    weighed = np.array([[weights.get(r, {}).get(c, np.nan) for c in columns] for r in drawn])
    # The class's own column is no candidate.
    weighed[np.isnan(grid)] = np.nan
    lines = []
    for r in rows:
        for c, rating in sorted(ratings[r].items(), key=lambda pair: -pair[1])[: 10 if len(rows) > 3 else None]:
            weight = weights.get(r, {}).get(c)
            lines.append([r, c, f"{rating:.3g}", "–" if weight is None else percent(weight)])
    first = sorted(ratings[rows[0]].items(), key=lambda pair: -pair[1])[:3]
    rater = similarity.body["rater"]
    lead = (
        f"Forgotten images are led towards classes that resemble them. How much they do was rated from 0 to 10 by "
        f"{rater}: for {rows[0]}, highest {listed([f'{c} ({rating:.3g})' for c, rating in first])}."
    )
    explained = (
        "Large: the rating. Small: the weight that it has in the transition matrix, a softmax over the ratings. "
    )
    detail = ("" if np.isnan(weighed).all() else explained) + " ".join(
        f"{name.capitalize()}: {similarity.body[name]}." for name in ("evidence", "date") if similarity.body.get(name)
    )
    alt = "Similarity ratings. " + "; ".join(f"{r[0]} and {r[1]}: {r[2]}" for r in lines[:12]) + "."
    figure = Figure(lambda look: figures.similarity(drawn, columns, grid, weighed, look), alt)
    table = Table(["forgotten", "class", "rating", "weight"], lines, folded="The ratings as a table")
    return Section("similarity", "What resembles what was forgotten", lead, detail, [figure], [table])


def noise(view: View) -> Section | None:
    """The noises; with forgotten images only where they are to be shown."""
    noise = view.sources.artifacts.get("noise")
    if noise is None:
        gone = "noise" in view.sources.evaluation.meta["lineage"]
        lead = "The noise pair is not in the run directory any more: it was purged, or not handed over."
        return Section("noise", "The noises", lead) if gone else None
    if not noise.tensors:
        return None
    scale = view.sources.scale
    pair = {k: noise.tensors[k].numpy() * scale for k in ("positive", "negative") if k in noise.tensors}
    if view.sources.bgr:
        pair = {k: np.flip(noises, 2) for k, noises in pair.items()}
    groups = {k: noise.tensors[f"{k}_class"].tolist() for k in pair}
    negative = noise.tensors.get("negative_class")
    names = {"positive": "N⁺", "negative": "N⁻"}
    rows: list[tuple[str, list[tuple[str, Any]]]] = []
    examples = list(view.sources.shown)
    if examples:
        rows.append(("image", [(f"{view.classes[y]} → {view.classes[k]}", x) for x, y, k in examples]))
        sums = []
        for kind in pair:
            which = [groups[kind].index(k if kind == "positive" else y) for _, y, k in examples]
            chosen = [pair[kind][g][i % pair[kind].shape[1]] for i, g in enumerate(which)]
            rows.append((names[kind], [("", n) for n in chosen]))
            sums.append(chosen)
        added = [sum(parts) for parts in zip(*sums, strict=True)]
        if len(pair) == 2:
            rows.append(("sum", [("", n) for n in added]))
        rows.append(("image + noise", [("", (x + n).clip(0, 1)) for (x, _, _), n in zip(examples, added, strict=True)]))
    elif len(pair) == 2 and negative is not None:
        columns = list(enumerate(groups["positive"]))[:8]
        minus = pair["negative"][0]
        rows = [
            ("N⁺", [(f"→ {view.classes[k]}", pair["positive"][g][0]) for g, k in columns]),
            ("N⁻", [(f"{view.classes[groups['negative'][0]]}", minus[i % len(minus)]) for i, _ in columns]),
            ("sum", [("", pair["positive"][g][0] + minus[i % len(minus)]) for i, (g, _) in enumerate(columns)]),
        ]
    else:
        for kind, noises in pair.items():
            for g, c in list(enumerate(groups[kind]))[:6]:
                rows.append(
                    (f"{names[kind]}  {view.classes[c]}", [(f"no. {i + 1}", n) for i, n in enumerate(noises[g][:8])])
                )
    settings = view.sources.evaluation.meta["lineage"].get("noise", {}).get("settings", {})
    carry = settings.get("noise.negative") == "carry"
    lead = (
        "Patterns that were added to images while the model forgot, so that it unlearns the features and not just the "
        "pictures. "
        + (
            "The negative noise carries what is typical of the forgotten class. "
            if "negative" in pair and carry
            else ""
        )
        + ("The negative noise leads away from the forgotten class. " if "negative" in pair and not carry else "")
        + ("The positive noise leads towards the new label. " if "positive" in pair else "")
        + (
            "This report shows forgotten images: handle it as you handle them."
            if examples
            else "No image is shown here."
        )
    )
    size = [
        [
            f"{names[k]} {view.classes[c]}",
            str(pair[k].shape[1]),
            f"{np.sqrt((noise.tensors[k][g].numpy() ** 2).mean()):.3f}",
        ]
        for k in pair
        for g, c in enumerate(groups[k])
    ]
    detail = "Blue is darker, red brighter; each picture is scaled by itself." if next(
        iter(pair.values())).shape[2] == 1 else "Drawn around grey; each picture is scaled by itself."  # fmt: skip
    alt = "Pictures of the noises: " + ", ".join(f"{name} ({len(pictures)})" for name, pictures in rows) + "."
    table = Table(["noise", "variants", "root mean square, normalised units"], size, folded="The noises as a table")
    figure = Figure(lambda look: figures.mosaic(rows, look), alt)
    return Section("noise", "The noises", lead, detail, [figure], [table])
