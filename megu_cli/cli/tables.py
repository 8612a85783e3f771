"""Results as tables on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_COLUMNS = {"original": "original", "mask": "masked", "unlearned": "unlearned", "oracle": "retrained"}
_METRICS = {
    "retain_train_acc": "accuracy, retained training images",
    "forget_train_acc": "accuracy, forget set",
    "retain_test_acc": "accuracy, retained test images",
    "forget_test_acc": "accuracy, forgotten classes' test images",
    "mia_entropy_lr": "membership inference, entropy",
    "mia_confidence_svc": "membership inference, confidence (non-members)",
    "probe_acc": "linear probe, forgotten classes",
}
_COMPARED = {
    "js_divergence": "JS divergence to retrained, forget set",
    "agreement": "agreement with retrained, forget set",
    "avg_gap": "average gap to retrained",
    "tow": "tug of war",
}
_COLOURS = {
    "fresh": "green",
    "absent": "green",
    "stale": "yellow",
    "missing": "cyan",
    "corrupt": "red",
    "blocked": "red",
}


def _console() -> Console:
    # A pipe has no width of its own: leave lines whole there.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def evaluation(result: dict[str, Any]) -> None:
    """The models side by side, then the requirements."""
    columns = [name for name in _COLUMNS if name in result]
    gone = result["request"]["classes"]
    if not gone:
        columns.remove("mask")  # with no class to mask it is the original
    table = Table(title=_title(result["request"]), title_justify="left")
    table.add_column("in percent")
    for name in columns:
        style = "bold" if name == "unlearned" else ""
        table.add_column(_COLUMNS[name], justify="right", style=style)
    for metric, label in _METRICS.items():
        values = [result[name][metric] for name in columns]
        if any(value is not None for value in values):
            table.add_row(label, *map(_percent, values))
    compared = result["comparison"]
    if compared:
        table.add_section()
        for metric, label in _COMPARED.items():
            show = (lambda v: "–" if v is None else f"{v:.3f}") if metric == "js_divergence" else _percent
            table.add_row(label, *(show(compared[n][metric]) if n in compared else "–" for n in columns))
    table.add_section()
    times = result["time"]
    seconds = {"original": times.get("train_s"), "mask": 0.0, "oracle": times.get("oracle_s")}
    own = [times.get(f"{stage}_s") for stage in ("labels", "noise", "finetune")]
    seconds["unlearned"] = None if None in own else sum(own)
    table.add_row("time, seconds", *("–" if seconds[n] is None else f"{seconds[n]:.1f}" for n in columns))
    if times["time_ratio"] is not None:
        ratio = [_percent(times["time_ratio"]) if n == "unlearned" else "" for n in columns]
        table.add_row("time, share of retraining", *ratio)
    console = _console()
    console.print(table)
    notes = []
    if "oracle" in columns:
        notes.append("the nearer to retrained the better.")
    else:
        notes.append("no retrained model here: `megu train --retain-only`, then `megu eval`, sets one beside it.")
    if "mask" in columns:
        notes.append("masked only hides the logits of what is forgotten: the cheat that a score must tell apart.")
    console.print(" ".join(notes), style="dim")
    for verdict in result.get("requirements", []):
        value = "no value" if verdict["value"] is None else f"{verdict['value']:.4f}"
        mark, colour = ("met", "green") if verdict["met"] else ("NOT MET", "bold red")
        console.print(f"{verdict['requirement']}: [{colour}]{mark}[/] ({value})")


def _title(request: dict[str, Any]) -> str:
    names = ", ".join(request["concepts"][:5]) + (", …" if len(request["concepts"]) > 5 else "")
    what = {"classes": f"class {names}", "subclasses": f"sub-class {names}"}.get(
        request["kind"], {"samples": "listed images", "random": "random images"}.get(request["kind"], "")
    )
    return f"Forgotten: {what} ({request['forget']:,} training images; {request['retain']:,} retained)"


def status(result: dict[str, Any]) -> None:
    """One line per stage."""
    table = Table()
    for column in ("stage", "status", "why", "file"):
        table.add_column(column, overflow="fold")
    for name, row in result["stages"].items():
        table.add_row(name, f"[{_COLOURS[row['status']]}]{row['status']}[/]", row["reason"], row["file"])
    _console().print(table)


def plan(result: dict[str, Any]) -> None:
    """What would run."""
    table = Table()
    for column in ("stage", "action", "why"):
        table.add_column(column, overflow="fold")
    for row in result["plan"]:
        style = "bold" if row["action"] == "run" else "dim"
        table.add_row(row["stage"], row["action"], row["reason"], style=style)
    _console().print(table)


def stages(result: dict[str, Any]) -> None:
    """What single stages made."""
    console = _console()
    for name, body in result.items():
        if name == "similarity":
            _ratings(console, body)
        elif name == "labels":
            _labels(console, body)
        elif name == "finetune" and body["validation_acc"]:
            console.print(f"accuracy on retained validation images: {_percent(body['validation_acc'][-1])}%")
        elif name in ("train", "oracle"):
            console.print(f"{body['model']} trained on {body['samples']:,} images; last loss {body['loss'][-1]:.4f}")
    console.print("\n".join(body["file"] for body in result.values()), style="dim")


def _ratings(console: Console, body: dict[str, Any]) -> None:
    if not body["scores"]:
        return
    table = Table(title=f"Similarity, 0 to 10, rated by {body['rater']}", title_justify="left")
    table.add_column("forgotten")
    table.add_column("most similar first", overflow="fold")
    for concept, row in body["scores"].items():
        best = sorted(row.items(), key=lambda pair: -pair[1])
        table.add_row(concept, ", ".join(f"{name} {rating:g}" for name, rating in best[:8]))
    console.print(table)


def _labels(console: Console, body: dict[str, Any]) -> None:
    table = Table(title=f"Perturbing labels ({body['mode']})", title_justify="left")
    table.add_column("label")
    table.add_column("images", justify="right")
    for name, number in sorted(body["counts"].items(), key=lambda pair: -pair[1]):
        table.add_row(name, f"{number:,}")
    console.print(table)


def purge(result: dict[str, Any]) -> None:
    """What a purge deleted and kept."""
    console = _console()
    if not result["deleted"] and not result["report"]:
        console.print("nothing to purge: no traces are here")
        return
    verb = "would delete" if result["dry_run"] else "deleted"
    for name, what in result["deleted"].items():
        console.print(f"{verb} [bold]{name}[/]: {what}", soft_wrap=True)
    if result["report"]:
        console.print(f"report.html: {result['report']}")
    console.print(f"kept: {', '.join(result['kept'])}", style="dim", soft_wrap=True)
    console.print(
        "Not megu's to delete: the images, the list of the request, your own checkpoint, and all copies elsewhere.",
        style="dim",
        soft_wrap=True,
    )


def where_next(folder: Path) -> None:
    """Where the demo's files are, and what to try with them."""
    console = _console()
    console.print(
        f"\nAll files are in [bold]{folder}[/]: megu.yaml is the config, model.safetensors the unlearned model."
    )
    console.print(
        f"Go on from there:  cd {folder} && megu status && megu run --set forget.classes='[3]'",
        soft_wrap=True,
    )
