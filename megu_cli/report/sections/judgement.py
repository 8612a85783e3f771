"""The verdict, every figure, and other methods beside them."""

from __future__ import annotations

from typing import Any

from megu_cli.evaluation.registry import Metric, find, metrics
from megu_cli.evaluation.requirements import absent
from megu_cli.pipeline.times import of_models
from megu_cli.report.parts import Section, Table, View
from megu_cli.report.words import counted, metric, percent, shown, title

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
    seconds = of_models(times, view.retrained_by is not None)
    cells = ["–" if seconds[m] is None else f"{seconds[m]:.1f} s" for m in view.models]
    parts = "" if view.retrained_by else "The unlearning counts labels, noise and finetuning."
    rows.append([f"Time to make it\n{parts}\n", *cells])
    if times.get("time_ratio") is not None:
        cells = [percent(times["time_ratio"]) if m == "unlearned" else "" for m in view.models]
        rows.append(["Time as a share of retraining\n\ntime_ratio", *cells])
    if view.retrained_by:
        lead = "The retrained model is the result itself, so no other one stands beside it as a yardstick."
    elif "oracle" in view.models:
        lead = (
            "The closer the unlearned column is to the retrained one, the better; neither 0% nor 100% is a goal of its "
            "own."
        )
    else:
        lead = "There is no retrained model to compare with; `megu train --retain-only` makes one."
    detail = ""
    if "mask" in view.models:
        detail = (
            "Masked is the original model that is merely forbidden to say the forgotten class. It forgets nothing, and "
            "stands here as a warning: a score that it reaches as well proves nothing by itself."
        )
    lead += _beside_the_mask(view)
    detail += "".join(f" “{title(name)}” is not measured: it needs {why}." for name, why in absent(body).items())
    for m in metrics("model", "report"):
        ends = {name: body.get("intervals", {}).get(name, {}).get(m.name) for name in view.models}
        told = [f"{view.names[name]} {m.text(low, 1)} to {m.text(high, 1, '%')}" for name, (low, high) in
                ((name, pair) for name, pair in ends.items() if pair)]  # fmt: skip
        detail += f" 95% intervals of “{title(m.name)}”: {', '.join(told)}." if told else ""
    head = ["", *(view.names[m] for m in view.models)]
    bold = 1 + view.models.index("unlearned")
    heading = "Before and now" if view.retrained_by else "Before, now, and retrained"
    return Section("results", heading, lead, detail.strip(), tables=[Table(head, rows, bold=bold)])


def _beside_the_mask(view: View) -> str:
    """Which of the masked and the unlearned model is nearer to the retrained one, and what that means."""
    masked, now = view.value("mask", "js_divergence"), view.value("unlearned", "js_divergence")
    if "mask" not in view.models or masked is None or now is None:
        return ""
    numbers = f"(JS divergence {now:.3f}, masked {masked:.3f})"
    if now < masked:
        return f" On the forgotten images the unlearned model answers more like it than the masked one does {numbers}."
    found, target = view.value("mask", "probe_acc"), view.value("oracle", "probe_acc")
    held = "" if found is None or target is None else f": {percent(found)} of the images, retrained {percent(target)}"
    return (
        f" On the forgotten images the masked model answers more like it than the unlearned one does {numbers}. To "
        f"hide an answer is enough for that, and it is no forgetting: a probe finds the class in the masked model as "
        f"before{held}."
    )


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
