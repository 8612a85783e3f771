"""The report's sections, each a function of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megu_cli.evaluation.registry import Metric, find, metrics
from megu_cli.evaluation.requirements import absent
from megu_cli.report import figures
from megu_cli.report.parts import Figure, Section, Table, View
from megu_cli.report.words import DIGESTED, MODELS, counted, listed, metric, percent, shown, title

_ROWS = 32  # classes in a figure; the tables hold all
_PATHS = 60  # rows of the flow's table


_CHECKS = {
    "behaviour": "It behaves like the retrained model",
    "depth": "Its features hold no more than the retrained model's",
    "membership": "An attacker learns no more than from the retrained model",
}


def verdict(view: View) -> Section:
    """The verdict with its reasons, then the requirements."""
    judged = view.verdict
    rows = []
    for check in judged["checks"]:
        m = metric(check["figure"])
        values = [m.text(check[key], 1, "%") for key in ("value", "oracle", "original")]
        margin = f"{check['margin']:.3f}" if m.unit == "number" else f"{100 * check['margin']:.1f} points"
        label = f"{_CHECKS[check['name']]}: {title(m.name)}"
        rows.append([label, *values, margin, "passed" if check["passed"] else "NOT PASSED"])
    marked = [row for row, check in enumerate(judged["checks"]) if not check["passed"]]
    head = ["check", "unlearned", "retrained", "original", "may be apart by", ""]
    tables = [Table(head, rows, marked)] if rows else []
    reason = judged["reason"]
    lead = f"{judged['verdict'].capitalize()}: {reason} {_required(view)}"
    detail = (
        "The checks need no configuration. A model passes one if its distance from the retrained model is at most half "
        "of the original's, or no more than the sampling error. docs/metrics.md explains the margins."
    )
    if view.sources.outcomes:
        tables.append(_requirements(view))
    return Section("verdict", "Verdict", lead, detail if judged["checks"] else "", tables=tables)


def _required(view: View) -> str:
    """How many requirements are met, in a sentence."""
    outcomes = view.sources.outcomes
    if not outcomes:
        return (
            "No requirement was set for this run. Requirements, such as verdict=forgotten, are set in the config under "
            "eval.require."
        )
    missed = sum(not outcome.met for outcome in outcomes)
    if not missed:
        return "Every requirement that was set beforehand is met."
    verb = "is" if missed == 1 else "are"
    return f"{missed} of {counted(len(outcomes), 'requirement')} that were set beforehand {verb} not met."


def _requirements(view: View) -> Table:
    """The requirements, and whether they are met."""
    outcomes = view.sources.outcomes
    rows = []
    for outcome in outcomes:
        label = "Verdict" if outcome.requirement.name == "verdict" else title(outcome.requirement.name)
        rows.append([label, str(outcome.requirement), outcome.measured, "met" if outcome.met else "NOT MET"])
    marked = [row for row, outcome in enumerate(outcomes) if not outcome.met]
    return Table(["What", "Required", "Measured", ""], rows, marked)


def results(view: View) -> Section:
    """Every metric of every model."""
    body = view.body
    listed_names = [m.name for group in ("model", "comparison") for m in metrics(group, "report")]
    known = [name for name in listed_names if any(view.value(m, name) is not None for m in view.models)]
    other = [
        name
        for part in (body["unlearned"], body["comparison"].get("unlearned", {}))
        for name, value in part.items()
        if find(name) is None and isinstance(value, (int, float))
    ]
    rows = []
    for name in [*known, *dict.fromkeys(other)]:
        cells = [shown(name, view.value(m, name)) for m in view.models]
        rows.append([f"{title(name)}\n{metric(name).plain}\n{name}", *cells])
    times = body["time"]
    own = [times.get(f"{stage}_s") for stage in ("labels", "noise", "finetune")]
    seconds = {
        "original": times.get("train_s"),
        "mask": 0.0,
        "unlearned": None if None in own else sum(own),
        "oracle": times.get("oracle_s"),
    }
    cells = ["–" if seconds[m] is None else f"{seconds[m]:.1f} s" for m in view.models]
    rows.append(["Time to make it\nThe unlearning counts labels, noise and finetuning.\n", *cells])
    if times.get("time_ratio") is not None:
        cells = [percent(times["time_ratio"]) if m == "unlearned" else "" for m in view.models]
        rows.append(["Time as a share of retraining\n\ntime_ratio", *cells])
    lead = (
        "The closer the unlearned column is to the retrained one, the better; neither 0% nor 100% is a goal of its own."
        if "oracle" in view.models
        else "There is no retrained model to compare with; `megu train --retain-only` makes one."
    )
    detail = ""
    if "mask" in view.models:
        detail = (
            "Masked is the original model that is merely forbidden to say the forgotten class. It forgets nothing, and "
            "stands here as a warning: a score that it reaches as well proves nothing by itself."
        )
    detail += "".join(f" “{title(name)}” is not measured: it needs {why}." for name, why in absent(body).items())
    for m in metrics("model", "report"):
        ends = {name: body.get("intervals", {}).get(name, {}).get(m.name) for name in view.models}
        told = [f"{MODELS[name]} {m.text(low, 1)} to {m.text(high, 1, '%')}" for name, (low, high) in
                ((name, pair) for name, pair in ends.items() if pair)]  # fmt: skip
        detail += f" 95% intervals of “{title(m.name)}”: {', '.join(told)}." if told else ""
    head = ["", *(MODELS[m] for m in view.models)]
    bold = 1 + view.models.index("unlearned")
    return Section("results", "Before, now, and retrained", lead, detail.strip(), tables=[Table(head, rows, bold=bold)])


def classes(view: View) -> Section:
    """Accuracy of each class before and after: collateral damage shows here."""
    near, forgotten = view.near(), view.forgotten
    models = [m for m in ("original", "unlearned", "oracle") if m in view.models]
    accuracy = {m: [view.body["per_class"][m]["test"][name] for name in view.classes] for m in models}

    def loss(c: int) -> float:
        before, now = accuracy["original"][c], accuracy["unlearned"][c]
        return 0.0 if before is None or now is None else before - now

    order = [*forgotten, *near]
    order += sorted(set(range(len(view.classes))) - set(order))
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
    if near:
        lead += (
            f" The nearest to what was forgotten, where harm shows first: {listed([view.classes[c] for c in near])}."
        )
    rows = []
    for c in order:
        before, now = accuracy["original"][c], accuracy["unlearned"][c]
        change = "–" if before is None or now is None else f"{100 * (now - before):+.1f}"
        kind = "forgotten" if c in forgotten else f"nearest, {near[c]}" if c in near else ""
        rows.append([view.classes[c], kind, *(percent(accuracy[m][c]) for m in models), change])
    table = Table(
        ["class", "", *(MODELS[m] for m in models), "change, points"],
        rows,
        marked=[row for row, c in enumerate(order) if c in forgotten],
        folded="All classes as a table",
    )
    figure = Figure(
        lambda look: figures.per_class(
            [view.classes[c] for c in drawn],
            {m: [accuracy[m][c] for c in drawn] for m in models},
            {row for row, c in enumerate(drawn) if c in forgotten},
            {row: f"({near[c]})" for row, c in enumerate(drawn) if c in near},
            look,
        ),
        alt="Accuracy of each class on test images before and after. "
        + "; ".join(f"{r[0]} {r[2]} before, {r[3]} after" for r in rows[:12])
        + ("; the table below has all." if len(rows) > 12 else "."),
    )
    detail = (
        "Accuracy on test images by class; nearest are the classes with the largest weights in the transition matrix."
    )
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
        f"What the unlearned model says of the {total:,} forgotten images now: "
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
        else "The perturbing labels were not at hand when this was evaluated."
    )
    figure = Figure(lambda look: figures.flow(paths, look), alt)
    table = Table(head, rows, folded="The flow as a table")
    return Section("flow", "Where the forgotten images go", lead, detail, [figure], [table])


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
        [MODELS[m], group, f"{images[group]:,}", _middle(of["loss"]), _middle(of["entropy"])]
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
    figure = Figure(lambda look: figures.histograms(told, MODELS, look), alt)
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
    focus = [*view.forgotten, *near] or list(range(len(view.classes)))[:8]
    rows = []
    for c in focus:
        cells = []
        for flat in points.values():
            own = flat[labels == c]
            others = {k: np.linalg.norm(own.mean(0) - flat[labels == k].mean(0)) for k in set(labels.tolist()) - {c}}
            nearest = min(others, key=lambda k: others[k]) if len(own) and others else None
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
        f"{r[0]}: " + ", ".join(f"{MODELS[m]} {cell}" for m, cell in zip(points, r[1:], strict=True)) for r in rows
    ) + "."  # fmt: skip
    figure = Figure(lambda look: figures.planes(points, labels, view.classes, view.forgotten, near, MODELS, look), alt)
    head = ["class", *(f"nearest class, {MODELS[m]}" for m in points)]
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
    return [Table(["", *(MODELS[m] for m in models)], rows, bold=1 + models.index("unlearned"))] if models else []


def comparison(view: View) -> Section | None:
    """Other methods on the same request, where `megu compare` was run."""
    compared = view.sources.comparison
    if compared is None:
        return None
    body = compared.body
    columns = [
        m
        for m in metrics()
        if m.column and any(row["mean"].get(m.name) is not None for row in body["methods"].values())
    ]

    def cell(row: dict[str, Any], m: Metric) -> str:
        mean, half = row["mean"].get(m.name), row["interval"].get(m.name)
        return m.text(mean, 1) + ("" if mean is None or half is None else f" ± {m.text(half, 1)}")

    names = list(body["methods"])
    rows = [[name, *(cell(body["methods"][name], m) for m in columns)] for name in names]
    floor, runs = body.get("noise_floor"), counted(len(body["seeds"]), "run")
    lead = (
        f"The same request through {counted(len(names), 'method')}, over {runs}. retrain is the yardstick; "
        "mask is the cheat that forgets nothing."
    )
    if floor is not None:
        lead += f" Two retrained models differ by {percent(floor)} on average: gaps smaller than that mean nothing."
    detail = (
        "In percent but for the distance (nats): mean over the runs, ± half of the 95% interval where there are "
        f"several. Columns: {', '.join(m.name for m in columns)}; `compare.json` has all."
    )
    table = Table(
        ["method", *(title(m.name) for m in columns)],
        rows,
        marked=[i for i, name in enumerate(names) if name == "megu"],
    )
    return Section("comparison", "Beside other methods", lead, detail, tables=[table])


def digests(view: View) -> Section:
    """Digests of all inputs and outputs; those of purged files are known from what was made of them."""
    meta = view.sources.evaluation.meta
    known: dict[str, str] = {}
    for recorded in (*meta["lineage"].values(), meta):
        known |= recorded["inputs"]
    known["eval"] = view.sources.evaluation.content
    made = [name for name in known if name in meta["lineage"] or name == "eval"]
    given = [[DIGESTED.get(name, name), known[name]] for name in DIGESTED if name in known and name not in made]
    outputs = [[DIGESTED.get(name, name), known[name]] for name in DIGESTED if name in made]
    finetune = view.sources.artifacts.get("finetune")
    for file, digest in (finetune.meta["weights"] if finetune else {}).items():
        outputs.append([f"the unlearned model ({file}), its tensors", digest])
    files = [[file, f"{size:,}", digest] for file, size, digest in view.sources.files]
    lead = (
        "Fingerprints of everything that went in and came out. Whoever has the files can check that this report is "
        "about them: sha256sum model.safetensors must give the line below."
    )
    detail = (
        "sha256. Inputs and artifacts are digested by content (names, labels, pixels; tensors), which does not depend "
        "on how a file is laid out; the last table digests the files byte by byte."
    )
    tables = [
        Table(["input", "digest of its content"], given),
        Table(["output", "digest of its content"], outputs),
        Table(["file", "bytes", "sha256 of the file"], files),
    ]
    return Section("digests", "Digests", lead, detail, tables=tables)


def settings(view: View) -> Section:
    """All settings that the result depends on."""
    meta = view.sources.evaluation.meta
    rows = []
    for stage, recorded in {**meta["lineage"], "eval": meta}.items():
        for key, value in _flat(recorded["settings"]).items():
            rows.append([stage, key, str(value)])
    lead = "The settings that this result was made with, stage by stage."
    return Section(
        "settings", "Settings", lead, tables=[Table(["stage", "setting", "value"], rows, folded="All settings")]
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
