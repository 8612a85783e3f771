"""What the model says: class by class, and of the forgotten images."""

from __future__ import annotations

from megu_cli.report import figures
from megu_cli.report.parts import Figure, Section, Table, View
from megu_cli.report.words import counted, listed, percent

_ROWS = 32  # classes in a figure; the tables hold all


_PATHS = 60  # rows of the flow's table


def classes(view: View) -> Section:
    """Accuracy of each class before and after: collateral damage shows here."""
    near, forgotten = view.near(), view.forgotten
    models = [m for m in ("original", "unlearned", "oracle") if m in view.models]
    accuracy = {m: [view.body["per_class"][m]["test"][name] for name in view.classes] for m in models}

    def loss(c: int) -> float:
        before, now = accuracy["original"][c], accuracy["unlearned"][c]
        return 0.0 if before is None or now is None else before - now

    order = [*forgotten, *near]
    order += sorted(set(view.shown) - set(order))
    drawn = order
    if len(order) > _ROWS:
        # Room for some only: after the forgotten and the near ones, those that lost most.
        rest = sorted(order[len(forgotten) + len(near) :], key=lambda c: -loss(c))
        drawn = (order[: len(forgotten) + len(near)] + rest)[:_ROWS]
    kept = [c for c in order if c not in forgotten and accuracy["unlearned"][c] is not None]
    worst = max(kept, key=loss, default=None)
    lead = "Did forgetting harm what should stay? "
    if worst is not None and loss(worst) > 0:
        lead += f"Of the kept classes, “{view.classes[worst]}” lost most: {100 * loss(worst):.1f} points."
    elif worst is not None:
        lead += "No kept class lost accuracy."
    unmeasured = sum(accuracy["unlearned"][c] is None for c in range(len(view.classes)) if c not in forgotten)
    if unmeasured:
        lead = lead.rstrip() + f" Not measured: {counted(unmeasured, 'class')} without test images."
    if near:
        lead += (
            f" The nearest to what was forgotten, where harm shows first: {listed([view.classes[c] for c in near])}."
        )
    absent = len(view.classes) - len(view.shown)
    rows = []
    for c in order:
        before, now = accuracy["original"][c], accuracy["unlearned"][c]
        change = "–" if before is None or now is None else f"{100 * (now - before):+.1f}"
        kind = "forgotten" if c in forgotten else f"nearest, {near[c]}" if c in near else ""
        rows.append([view.classes[c], kind, *(percent(accuracy[m][c]) for m in models), change])
    table = Table(
        ["class", "", *(view.names[m] for m in models), "change, points"],
        rows,
        marked=[row for row, c in enumerate(order) if c in forgotten],
        folded="All classes as a table"
        if len(view.shown) == len(view.classes)
        else "All classes with images as a table",
    )
    figure = Figure(
        lambda look: figures.per_class(
            [view.classes[c] for c in drawn],
            {m: [accuracy[m][c] for c in drawn] for m in models},
            {row for row, c in enumerate(drawn) if c in forgotten},
            {row: f"({near[c]})" for row, c in enumerate(drawn) if c in near},
            view.names["unlearned"],
            look,
        ),
        alt="Accuracy of each class on test images before and after. "
        + "; ".join(f"{r[0]} {r[2]} before, {r[3]} after" for r in rows[:12])
        + ("; the table below has all." if len(rows) > 12 else "."),
    )
    detail = "Accuracy on test images by class" + (
        "; nearest are the classes with the largest weights in the transition matrix." if near else "."
    )
    if absent:
        detail += f" {counted(absent, 'class')} of the model {'has' if absent == 1 else 'have'} no images at all."
    return Section("classes", "Class by class", lead, detail, [figure], [table])


def flow(view: View) -> Section | None:
    """From the old label over the perturbing label to the new prediction."""
    told = view.body.get("aggregates", {}).get("flow")
    if not told:
        return None
    paths = [(view.classes[a], None if b is None else view.classes[b], view.classes[c], n) for a, b, c, n in told]
    total = sum(path[3] for path in paths)
    same = sum(path[3] for path in paths if path[0] == path[2])
    old = f"For {percent(same / total)} it still says the old label." if same else "For none it says the old label."
    middle = paths[0][1] is not None
    counts: dict[str, int] = {}
    for path in paths:
        counts[path[2]] = counts.get(path[2], 0) + path[3]
    top = sorted(counts.items(), key=lambda item: -item[1])[:3]
    lead = (
        f"What the {view.names['unlearned']} model says of the {total:,} forgotten images now: "
        + ", ".join(f"“{name}” for {percent(n / total)}" for name, n in top)
        + f". {old}"
    )
    kind = view.request["kind"]
    if kind == "subclasses":
        lead += " The class itself stays, so that may be right: the measure is what a retrained model says."
    elif kind != "classes":
        lead += " Where single images are forgotten that is no fault: a model that never saw them recognises many too."
    elif middle:
        followed = sum(path[3] for path in paths if path[1] == path[2])
        lead += f" {percent(followed / total)} ended at the label that they were led to."
    head = ["old label", *(["perturbing label"] if middle else []), "says now", "images", "share"]
    rows = [[a, *([str(b)] if middle else []), c, f"{n:,}", percent(n / total)] for a, b, c, n in paths]
    if len(rows) > _PATHS:
        others = f"{sum(path[3] for path in paths[_PATHS:]):,}"
        rows = [*rows[:_PATHS], *[["others", *(["others"] if middle else []), "others", others, ""]]]
    alt = "Flow of the forgotten images. " + "; ".join(
        f"{n} from {a}" + (f" over {b}" if b else "") + f" to {c}" for a, b, c, n in paths[:8]
    ) + "."  # fmt: skip
    detail = (
        "The perturbing label is the class that an image was first trained towards, or in a soft target the likeliest "
        "other class; it may move on during finetuning."
        if middle
        else "A retrained model has no perturbing labels."
        if view.retrained_by
        else "The perturbing labels were not at hand when this was evaluated."
    )
    figure = Figure(lambda look: figures.flow(paths, look), alt)
    table = Table(head, rows, folded="The flow as a table")
    return Section("flow", "Where the forgotten images go", lead, detail, [figure], [table])
