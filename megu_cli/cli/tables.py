"""Results as tables on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megu_cli.cli.console import output as _console
from megu_cli.evaluation.registry import Metric, metrics
from megu_cli.pipeline.times import of_models
from megu_cli.report.words import counted

_COLUMNS = {"original": "original", "mask": "masked", "unlearned": "unlearned", "oracle": "retrained"}
_COLOURS = {
    "fresh": "green",
    "done": "green",
    "absent": "green",
    "stale": "yellow",
    "missing": "cyan",
    "corrupt": "red",
    "blocked": "red",
}


# Of a table of labels; with thousands of classes the rest is counted.
_ROWS = 40


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _add_figures(table: Table, metric: Metric, models: list[dict[str, Any]]) -> None:
    """A row of one metric, if a model has a figure of it. A relearning that was measured without an end says never."""
    never = metric.unit == "epochs"
    if never or any(figures.get(metric.name) is not None for figures in models):
        cells = [
            "" if never and metric.name not in figures else metric.text(figures.get(metric.name)) for figures in models
        ]
        table.add_row(metric.label, *("never" if never and cell == "–" else cell for cell in cells))


def _add_intervals(table: Table, metric: Metric, models: list[dict[str, Any]]) -> None:
    """A row of one metric's intervals, if there are any."""
    found = [figures.get(metric.name) for figures in models]
    if any(found):
        cells = ["–".join(metric.text(end, 1) for end in ends) if ends else "" for ends in found]
        table.add_row(Text("  its 95% interval", "dim"), *(Text(cell, "dim") for cell in cells))


def evaluation(result: dict[str, Any]) -> None:
    """The models side by side, then the requirements."""
    retrained = "retrained_by" in result
    columns = [name for name in _COLUMNS if name in result]
    gone = result["request"]["classes"]
    if not gone:
        columns.remove("mask")  # with no class to mask it is the original
    table = Table(title=_title(result["request"]), title_justify="left")
    table.add_column("in percent")
    for name in columns:
        style = "bold" if name == "unlearned" else ""
        head = _COLUMNS["oracle" if name == "unlearned" and retrained else name]
        table.add_column(head, justify="right", style=style)
    for metric in metrics("model", "table"):
        if any(metric.name in result[name] for name in columns):
            _add_figures(table, metric, [result[name] for name in columns])
            _add_intervals(table, metric, [result.get("intervals", {}).get(name, {}) for name in columns])
    for metric in metrics("entanglement", "table"):
        _add_figures(table, metric, [result["entanglement"].get(name, {}) for name in columns])
    compared = result["comparison"]
    if compared:
        table.add_section()
        for metric in metrics("comparison", "table"):
            _add_figures(table, metric, [compared.get(name, {}) for name in columns])
    table.add_section()
    times = result["time"]
    seconds = of_models(times, retrained)
    table.add_row("time, seconds", *("–" if seconds[n] is None else f"{seconds[n]:.1f}" for n in columns))
    if times["time_ratio"] is not None:
        ratio = [_percent(times["time_ratio"]) if n == "unlearned" else "" for n in columns]
        table.add_row("time, share of retraining", *ratio)
    console = _console()
    console.print(table)
    notes = []
    if retrained:
        notes.append("the retrained model is the result: it was trained without the forgotten images.")
    elif "oracle" in columns:
        notes.append("the nearer to retrained the better.")
    else:
        notes.append("no retrained model here: `megu train --retain-only`, then `megu eval`, sets one beside it.")
    if "mask" in columns:
        notes.append("masked only hides the logits of what is forgotten: the cheat that a score must tell apart.")
    console.print(" ".join(notes), style="dim")
    for metric, needed in result.get("absent", {}).items():
        if metric in {shown.name for shown in metrics("model", "table")}:
            console.print(f"{metric} is not measured: it needs {needed}.", style="dim")
    unseen = sum(value is None for value in result["per_class"]["original"]["test"].values())
    if unseen:
        console.print(f"not measured: {counted(unseen, 'class')} without test images.", style="dim")
    if (times["time_ratio"] or 0) > 1:
        console.print("Retraining took less time than labels, noise and finetune, and is exact: `megu run --retrain`.")
    for line in result.get("warnings", ()):
        console.print(Text.assemble(("Warning", "bold yellow"), f": {line}."))
    if verdict := result.get("verdict"):
        colour = {"forgotten": "bold green", "not forgotten": "bold red"}.get(verdict["verdict"], "bold yellow")
        console.print(Text.assemble("Verdict: ", (verdict["verdict"], colour), f": {verdict['reason']}"))
    for outcome in result.get("requirements", []):
        mark, colour = ("met", "green") if outcome["met"] else ("NOT MET", "bold red")
        console.print(Text.assemble(f"{outcome['requirement']}: ", (mark, colour), f" ({outcome['measured']})"))


def comparison(result: dict[str, Any]) -> None:
    """Methods as rows: mean ± 95% interval over seeds, the best of each column in bold."""
    from megu_cli.compare import REFERENCES, figures, nearest

    rows, seeds = result["methods"], result["seeds"]
    shown = [m for m in metrics() if m.column and any(row["mean"].get(m.name) is not None for row in rows.values())]
    bold = {metric.name: nearest(rows, metric.name, REFERENCES) for metric in shown}
    # An interval of two seeds says nothing: it is wider than any figure.
    ranges = len(seeds) < 3
    over = {1: "one seed", 2: "the range of two seeds"}.get(len(seeds), f"mean ± 95% interval over {len(seeds)} seeds")
    table = Table(title=f"{_title(result['request'])}\n{over}", title_justify="left")
    table.add_column("in percent", no_wrap=True)
    for metric in shown:
        table.add_column(metric.column, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = []
        for metric in shown:
            plain = metric.unit != "percent"
            if ranges:
                text = _range([figures(cell).get(metric.name) for cell in row["seeds"].values()], plain)
            else:
                half = row["interval"].get(metric.name) if metric.group != "time" else None
                text = _interval(row["mean"].get(metric.name), half, plain)
            cells.append(Text(text, "bold" if bold[metric.name] == name else ""))
        table.add_row(name, *cells, style="dim" if name in REFERENCES else "", end_section=name == "retrain")
    console = _console()
    console.print(table)
    floor = result["noise_floor"]
    console.print(
        "retrain is held against the oracle of another seed; every other method against the oracle of its own. "
        + (f"Noise floor of the average gap: {_percent(floor)}. " if floor is not None else
           "A noise floor needs three seeds and the method retrain. ")
        + "retained: accuracy on test images; forgotten: on training images; time: mean share of retraining.",
        style="dim",
    )  # fmt: skip
    _attacks(console, result.get("ulira", {}))
    for name, failures in result["failed"].items():
        for seed, message in failures.items():
            console.print(Text.assemble(("failed", "bold red"), f": {name}, seed {seed}: {message}"))
    for name, trials in result["tuned"].items():
        told = ", ".join(f"{key}={value}" for key, value in rows[name]["settings"].items() if key in
                         trials[0]["settings"]) if name in rows else "failed"  # fmt: skip
        console.print(f"tuned {name}: {told}", style="dim")


def _attacks(console: Console, attacks: dict[str, Any]) -> None:
    """U-LiRA of each method: how well an attack tells its models from oracles."""
    for name, attack in attacks.items():
        chance = "{} to {}".format(*map(_percent, attack["auc_chance"]))
        interval = " ({} to {})".format(*map(_percent, attack["auc_interval"])) if attack["auc_interval"] else ""
        console.print(
            f"U-LiRA, {name}: AUC {_percent(attack['auc'])}{interval}, by chance {chance}; "
            f"{_percent(attack['accuracy'])}% of images and models told apart rightly ({attack['seeds']} seeds)",
            style="dim",
        )


def _range(values: list[float | None], plain: bool) -> str:
    """Smallest and largest of a few seeds; one number where they are equal."""
    known = [_interval(value, None, plain) for value in sorted(v for v in values if v is not None)]
    return "–" if not known or len(known) < len(values) else "–".join(dict.fromkeys((known[0], known[-1])))


def _interval(mean: float | None, half: float | None, plain: bool) -> str:
    if mean is None:
        return "–"
    scale, digits = (1, 3) if plain else (100, 1)
    text = f"{scale * mean:.{digits}f}"
    return text if half is None else f"{text}±{scale * half:.{digits}f}"


def _title(request: dict[str, Any]) -> str:
    names = ", ".join(request["concepts"][:5]) + (", …" if len(request["concepts"]) > 5 else "")
    what = {
        "classes": f"class {names}",
        "subclasses": f"sub-class {names}",
        "samples": "listed images",
        "subjects": "images of the listed subjects",
        "random": "random images",
    }[request["kind"]]
    return f"Forgotten: {what} ({request['forget']:,} training images; {request['retain']:,} retained)"


def status(result: dict[str, Any]) -> None:
    """One line per stage."""
    table = Table()
    for column in ("stage", "status", "why", "file"):
        table.add_column(column, overflow="fold")
    for name, row in result["stages"].items():
        table.add_row(name, Text(row["status"], _COLOURS[row["status"]]), row["reason"], row["file"])
    console = _console()
    console.print(table)
    if "done" in result:
        console.print(f"done; images deleted: {result['done']}", soft_wrap=True)


def plan(result: dict[str, Any]) -> None:
    """What would run and, where it was estimated, what it takes."""
    table = Table()
    for column in ("stage", "action", "why"):
        table.add_column(column, overflow="fold")
    estimated = "retraining" in result
    if estimated:
        for column in ("steps", "MLLM calls", "about", "peak memory", "disk"):
            table.add_column(column, justify="right", no_wrap=True)
    for row in result["plan"]:
        style = "bold" if row["action"] == "run" else "dim"
        table.add_row(row["stage"], row["action"], row["reason"], *(_takes(row) if estimated else ()), style=style)
    console = _console()
    for note in result.get("notes", ()):
        console.print(note, markup=False)
    if asked := result.get("forget"):
        shown = ", ".join(asked["first"]) + (", …" if asked["images"] > len(asked["first"]) else "")
        console.print(f"{asked['images']:,} training images would be forgotten: {shown}", markup=False)
    if estimated:
        table.add_section()
        total = {"steps": 0, **result["total"]}
        table.add_row("what would run", "", "", *_takes(total))
        if result["time_ratio"] is not None:
            table.add_row("retraining", "", "for comparison", *_takes(result["retraining"]), style="dim")
    console.print(table)
    if estimated:
        _told(console, result)
    elif "note" in result:
        console.print(result["note"], style="yellow", markup=False)


def _told(console: Console, result: dict[str, Any]) -> None:
    ratio = result["time_ratio"]
    if ratio is not None:
        console.print(f"labels, noise and finetune take about {100 * ratio:.1f}% of the time of retraining.")
        if ratio > 0.5:
            if ratio > 1:
                console.print("Retraining takes less time, and is exact: `megu run --retrain`.")
            console.print("Less with a smaller finetune.retain_fraction (1: each retained image once) or --max-steps.")
    if result["total"]["untimed"]:
        console.print(f"Not timed, since nothing is sent before you say so: {', '.join(result['total']['untimed'])}.")
    console.print("Estimates, from a few batches on this machine as busy as it is now. Nothing was run.", style="dim")


def _takes(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['steps']:,}" if row["steps"] else "",
        f"{row['calls']:,}" if row["calls"] else "",
        _duration(row["seconds"]),
        _size(row["memory_bytes"]),
        _size(row["disk_bytes"]),
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(number: int | None) -> str:
    if not number:
        return ""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number} B"


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
    written = [file for body in result.values() for file in (body["file"], *body.get("models", ()))]
    console.print("\n".join(written), style="dim")


def rating_cost(result: dict[str, Any]) -> None:
    """What the similarity stage would take."""
    plan(result)
    cost, console = result["cost"], _console()
    if cost is None:
        console.print("Nothing is asked: the ratings are there.")
        return
    if not cost["calls"]:
        console.print("Nothing is asked.")
        return
    kept = f" ({cost['answered']:,} more are answered already)" if cost["answered"] else ""
    console.print(
        f"{cost['calls']:,} calls{kept}, {cost['images']:,} images, about {cost['tokens']:,} tokens of input, "
        f"to {cost['host'] or 'a model in this process'}"
    )
    if cost["leaves"]:
        allowed = "" if cost["allowed"] else ", and is refused unless mllm.allow_remote is true"
        console.print(f"This leaves the machine{allowed}.", style="bold yellow")
    else:
        console.print("Nothing leaves this machine.")


def similarity(result: dict[str, Any]) -> None:
    """Ratings, how they agree with others, and the whole matrix where it was asked for."""
    stages({name: result[name] for name in ("similarity", "transition")})
    console = _console()
    if "against" in result:
        _agreement(console, result["against"])
    if "figure" in result:
        _matrix(console, result["similarity"])
        console.print(result["figure"], style="dim")


def _agreement(console: Console, found: dict[str, Any]) -> None:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    console.print(f"\nRank correlation (Spearman) with the ratings of {found['rater']}", markup=False)
    if not found["ratings"]:
        console.print(f"{found['file']} rates none of these pairs of classes.", style="yellow", markup=False)
        return
    table = Table()
    for column in ("row", "correlation", "ratings", "largest differences: here / there"):
        table.add_column(column, overflow="fold", justify="right" if column in ("correlation", "ratings") else "left")
    for row in found["rows"]:
        apart = ", ".join(f"{d['candidate']}: {_rating(d['here'])} / {_rating(d['there'])}" for d in row["differences"])
        table.add_row(row["concept"], number(row["spearman"]), str(row["ratings"]), apart)
    table.add_section()
    table.add_row("overall", number(found["spearman"]), str(found["ratings"]))
    console.print(table)


def _rating(value: float) -> str:
    """One decimal, and none where it is 0."""
    return f"{value:.1f}".removesuffix(".0")


def _matrix(console: Console, body: dict[str, Any]) -> None:
    """Candidates down, rated concepts across: a hundred classes are long, but fit."""
    scores = body["scores"]
    names = [name for name in body["classes"] if any(name in row for row in scores.values())]
    side = max(map(len, names), default=0)
    heads, columns = list(scores), [max(len(concept), 2) + 1 for concept in scores]
    console.print("\nHow similar is the class above to the one on the left?")
    if side + sum(columns) > console.width:  # numbers instead of names
        console.print("\n".join(f"{i:>3} {concept}" for i, concept in enumerate(scores, 1)), markup=False)
        heads, columns = [str(i) for i in range(1, len(scores) + 1)], [4 if len(scores) > 99 else 3] * len(scores)
    room = max((console.width - side) // max(columns, default=1), 1) if heads != list(scores) else len(scores)
    for start in range(0, len(scores), room):
        part = slice(start, start + room)
        shown = list(zip(heads[part], columns[part], list(scores.items())[part], strict=True))
        console.print(" " * side + "".join(f"{head:>{wide}}" for head, wide, _ in shown), markup=False)
        for name in names:
            line = Text(name.rjust(side))
            for _, wide, (concept, row) in shown:
                gap = "·" if name == concept else "?"
                line.append(f"{row[name]:.0f}".rjust(wide) if name in row else gap.rjust(wide), _heat(row.get(name)))
            console.print(line)


def _heat(rating: float | None) -> str:
    """Dark blue for 0 to yellow for 10."""
    if rating is None:
        return ""
    share = rating / 10
    red, green, blue = (round(low + share * (high - low)) for low, high in ((30, 250), (40, 210), (110, 60)))
    return f"{'black' if share > 0.5 else 'white'} on rgb({red},{green},{blue})"


_NEAREST = 8


def _ratings(console: Console, body: dict[str, Any]) -> None:
    if not body["scores"]:
        return
    console.print(f"Similarity, 0 to 10, rated by {body['rater']}", markup=False)
    table = Table()
    table.add_column("forgotten")
    table.add_column("most similar first", overflow="fold")
    for concept, row in body["scores"].items():
        best = sorted(row.items(), key=lambda pair: -pair[1])
        told = ", ".join(f"{name}: {_rating(value)}" for name, value in best[:_NEAREST])
        table.add_row(concept, told + (", …" if len(best) > _NEAREST else ""))
    console.print(table)
    missing = [f"{concept}: {', '.join(names)}" for concept, names in body.get("missing", {}).items()]
    if missing:
        console.print("not rated, and so never a label: " + "; ".join(missing), style="yellow", markup=False)


def _labels(console: Console, body: dict[str, Any]) -> None:
    table = Table(title=f"Perturbing labels ({body['mode']})", title_justify="left")
    table.add_column("label")
    table.add_column("images", justify="right")
    rows = sorted(body["counts"].items(), key=lambda pair: -pair[1])
    for name, number in rows[:_ROWS]:
        table.add_row(name, f"{number:,}")
    console.print(table)
    if len(rows) > _ROWS:
        rest = sum(number for _, number in rows[_ROWS:])
        console.print(f"and {len(rows) - _ROWS:,} labels more, of {rest:,} images", style="dim")


def purge(result: dict[str, Any]) -> None:
    """What a purge deleted and kept."""
    console = _console()
    if not result["deleted"]:
        console.print("nothing to purge: no traces are here")
    verb = "would delete" if result["dry_run"] else "deleted"
    for name, what in result["deleted"].items():
        console.print(Text.assemble(f"{verb} ", (name, "bold"), f": {what}"), soft_wrap=True)
    console.print("kept:", style="dim")
    for name in result["kept"]:
        console.print(f"  {name}", style="dim", soft_wrap=True)
    console.print(
        "Not megu's to delete: the images, the list of the request, your own checkpoint, and all copies elsewhere.",
        style="dim",
        soft_wrap=True,
    )


def where_next(folder: Path) -> None:
    """Where the demo's files are, and what to try with them."""
    console = _console()
    console.print(
        Text.assemble(
            "\nAll files are in ",
            (str(folder), "bold"),
            ": megu.yaml is the config, model.safetensors the unlearned model.",
        )
    )
    console.print(
        f"Go on from there:  cd {folder} && megu status && megu run --set forget.classes='[3]'",
        soft_wrap=True,
    )
