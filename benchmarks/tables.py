"""Every table and figure of docs/benchmarks.md, from the JSON files in benchmarks/.

    python benchmarks/tables.py [benchmark.json] [ablations.json] [speed.json] [defaults.json] [ulira.json] [--out DIR]

A table replaces what stands between its two marks in benchmarks.md, `<!-- NAME -->` and `<!-- /NAME -->`; one without
marks is added at the end. Figures go to figures/ beside it. What is missing of the benchmark is said, not left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megu_cli.compare import REFERENCES, distances, figures, nearest

HERE = Path(__file__).parent
OURS = ("megu", "megu-paper")


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f}"


def nats(value: float) -> str:
    """A divergence."""
    return f"{value:.3f}"


def plain(value: float) -> str:
    """A count."""
    return f"{value:.1f}"


# Figure -> (column, format).
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "avg_gap": ("gap", percent),
    "js_divergence": ("JS", nats),
    "agreement": ("agr.", percent),
    "forget_train_acc": ("forget train", percent),
    "forget_test_acc": ("forget test", percent),
    "retain_test_acc": ("retain test", percent),
    "mia_entropy_lr": ("MIA", percent),
    "mia_loss_auc": ("loss AUC", percent),
    "probe_acc": ("probe", percent),
    "relearn_epochs": ("relearn", plain),
    "time_ratio": ("time", percent),
}
WORDS = {
    "avg_gap": "gap",
    "js_divergence": "JS",
    "probe_acc": "depth (distance of the probe to the oracle's)",
    "mia_loss_auc": "loss attack (distance of its AUC to the oracle's)",
    "retain_test_acc": "retained test accuracy (distance to the oracle's)",
}
RESIDUE: dict[str, tuple[str, Callable[[float], str]]] = {
    "probe_acc": ("probe", percent),
    "relearn_epochs": ("relearn epochs", plain),
    "centroid_cosine": ("cosine of class centroids", nats),
    "cka_forget": ("CKA with the original, forgotten images", nats),
    "cka_retain": ("CKA with the original, retained images", nats),
}
ABLATED: dict[str, tuple[str, Callable[[float], str]]] = {
    name: COLUMNS[name]
    for name in ("avg_gap", "js_divergence", "agreement", "forget_train_acc", "retain_test_acc", "mia_loss_auc",
                 "probe_acc", "time_ratio")
}  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, nargs="?", default=HERE / "benchmark.json")
    parser.add_argument("ablations", type=Path, nargs="?", default=HERE / "ablations.json")
    parser.add_argument("speed", type=Path, nargs="?", default=HERE / "speed.json")
    parser.add_argument("defaults", type=Path, nargs="?", default=HERE / "defaults.json")
    parser.add_argument("ulira", type=Path, nargs="?", default=HERE / "ulira.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", metavar="DIR", help="where benchmarks.md is")
    arguments = parser.parse_args(words)

    blocks: dict[str, str] = {}
    if arguments.benchmark.exists():
        result = json.loads(arguments.benchmark.read_text(encoding="utf-8"))
        blocks |= of_benchmark(result, arguments.out)
    if arguments.ablations.exists():
        result = json.loads(arguments.ablations.read_text(encoding="utf-8"))
        blocks |= of_ablations(result, arguments.out)
    if arguments.defaults.exists():
        result = json.loads(arguments.defaults.read_text(encoding="utf-8"))
        blocks["classes"] = of_classes(result["classes"])
        if result.get("shares"):
            blocks["shares"] = of_shares(result["shares"])
    if arguments.ulira.exists():
        blocks["ulira"] = of_ulira(json.loads(arguments.ulira.read_text(encoding="utf-8"))["requests"])
    if arguments.speed.exists():
        blocks["speed"] = of_speed(json.loads(arguments.speed.read_text(encoding="utf-8")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / "benchmarks.md"
    before = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    page.write_text(filled(before, blocks), encoding="utf-8")
    print(f"wrote {', '.join(blocks)} into {page}")


def filled(page: str, blocks: dict[str, str]) -> str:
    """The page with every block between its marks; one that has none comes at the end."""
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        marked = f"{start}\n{block.strip()}\n{end}"
        before, there, rest = page.partition(start)
        page = before + marked + rest.partition(end)[2] if there else f"{page}\n{marked}\n"
    return page


def of_classes(found: dict[str, Any]) -> str:
    """Markdown of what `defaults.py` measured: a row for each class, then megu beside each method over all classes."""
    from defaults import DEVELOPMENT

    others = [name for name in ("finetune", "ct", "msg", "mask") if all(name in rows for rows in found.values())]
    columns = ["megu", *others, "retrain"]
    lines = []
    for figure, what in (("js_divergence", "JS on the forget set"), ("avg_gap", "Average gap in points")):
        lines += [f"{what}, mean over the seeds (`retrain`: another oracle):", ""]
        lines += [row(["class", *columns]), row(["---"] * (1 + len(columns)))]
        for name, rows in found.items():
            values = [COLUMNS[figure][1](_over(rows, method, figure)) for method in columns]
            lines.append(row([name + " *" * (name in DEVELOPMENT), *values]))
        lines.append("")
    lines += ["Depth and retained accuracy, in percent, mean over the seeds:", ""]
    lines += [row(["class", "probe: megu", "oracle", "retained test: megu", "oracle"]), row(["---"] * 5)]
    shown = [(method, figure) for figure in ("probe_acc", "retain_test_acc") for method in ("megu", "retrain")]
    for name, rows in found.items():
        values = [percent(_over(rows, method, figure)) for method, figure in shown]
        lines.append(row([name, *values]))
    unseen = {name: rows for name, rows in found.items() if name not in DEVELOPMENT}
    lines += [
        "",
        f"Distance to the oracle, less megu's, over the {len(unseen)} classes without * and their seeds: mean and 95% "
        "interval. Above 0, megu is nearer.",
        "",
        row(["method", "JS", "gap, points"]),
        row(["---"] * 3),
    ]
    for method in [*others, "retrain"]:
        lines.append(row([method, *(_difference(unseen, method, figure) for figure in ("js_divergence", "avg_gap"))]))
    return "\n".join(lines)


def of_shares(found: dict[str, Any]) -> str:
    """Markdown of what `defaults.py` measured of random shares: a row for each share and method."""
    figures = ("avg_gap", "js_divergence", "forget_train_acc", "mia_loss_auc", "retain_test_acc")
    lines = [row(["request", "method", *(COLUMNS[figure][0] for figure in figures)]), row(["---"] * (2 + len(figures)))]
    for name, rows in found.items():
        for method, seeds in rows.items():
            shown = [_spread([cell[figure] for cell in seeds.values()], COLUMNS[figure][1]) for figure in figures]
            lines.append(row([name, f"`{method}`", *shown]))
    return "\n".join(lines)


def of_ulira(requests: dict[str, Any]) -> str:
    """Markdown of what `ulira.py` measured: a row for each request and method."""
    head = ("request", "method", "seeds", "AUC", "by chance", "accuracy", "hits at 1%", "at 0.1%")
    lines = [row(head), row(["---"] * len(head))]
    for name, methods in requests.items():
        for method, attack in methods.items():
            interval = " ({} to {})".format(*map(percent, attack["auc_interval"])) if attack["auc_interval"] else ""
            chance = "{} to {}".format(*map(percent, attack["auc_chance"]))
            rates = [percent(attack[key]) for key in ("accuracy", "tpr_at_1fpr", "tpr_at_01fpr")]
            auc = percent(attack["auc"]) + interval
            lines.append(row([name, f"`{method}`", str(attack["seeds"]), auc, chance, *rates]))
    return "\n".join(lines)


def _over(rows: dict[str, Any], method: str, figure: str) -> float:
    """Mean of a figure over the seeds of a method."""
    return statistics.mean(cell[figure] for cell in rows[method].values())


def _difference(found: dict[str, Any], method: str, figure: str) -> str:
    """How much farther a method is than megu, over requests and seeds."""
    pairs = [rows[method][seed][figure] - own[figure] for rows in found.values() for seed, own in rows["megu"].items()]
    return _spread(pairs, COLUMNS[figure][1])


def _spread(values: list[float], show: Callable[[float], str]) -> str:
    """Mean and half of the 95% interval, by Student's t."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{show(statistics.mean(values))} ± {show(half)}"


def of_speed(result: dict[str, Any]) -> str:
    """Markdown of what `speed.py` measured, which draws its figure itself."""
    from speed import told

    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    head = (
        f"{result['machine']}, {threads}; torch {result['versions']['torch']}; medians of {result['sizes']['repeat']}."
    )
    lines = "\n".join(f"- {line}" for line in told(result).splitlines())
    return f"{head}\n\n{lines}\n\n![Cost by size, and what a process costs beside its stage](figures/speed.svg)"


# -- the benchmark -----------------------------------------------------------------------------------------------------


def of_benchmark(result: dict[str, Any], out: Path) -> dict[str, str]:
    """Name -> Markdown of each block of the benchmark, and its figure."""
    order = {"classes": 0, "subclasses": 1}
    cells = dict(sorted(result["cells"].items(), key=lambda item: order.get(item[1]["request"]["kind"], 2)))
    blocks = {"machine": machine(result), "summary": overview(cells)}
    blocks |= {name: section(name, cell) for name, cell in cells.items()}
    blocks["residue"] = "\n\n".join(residue(name, cell) for name, cell in cells.items())
    if cells:
        draw_methods(cells, out / "figures" / "methods.svg")
        blocks["figure-methods"] = (
            "![Each method's distance to retraining: in behaviour (JS divergence) and in depth](figures/methods.svg)"
        )
    return blocks


def machine(result: dict[str, Any]) -> str:
    """On what the figures were measured, and which are not there."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    hours = sum(cell["wall_seconds"] for cell in result["cells"].values()) / 3600
    lines = [f"Measured on {result['machine']}; {versions}; {hours:.1f} hours in all, without the originals."]
    lines += [f"- **Missing:** {name}: {reason}." for name, reason in result["missing"].items()]
    return "\n".join(lines)


def overview(cells: dict[str, Any]) -> str:
    """A line for each request: megu beside the best of the others in each figure, and the verdict on all of them."""
    head = ["request", *(f"{COLUMNS[f][0]}: megu / best other / another oracle" for f in main_figures())]
    lines = [row(head), row(["---"] * len(head))]
    for name, cell in cells.items():
        if "megu" in cell["methods"]:
            limit, seeds = cell["config"].get("data.limit"), len(cell["seeds"])
            size = f"{limit:,} images" if limit else "all images"
            lines.append(row([f"{name}: {size}, {seeds} seeds", *(beside(cell, f) for f in main_figures())]))
    return "\n".join(lines)


def main_figures() -> tuple[str, ...]:
    """The figures of the overview."""
    return ("avg_gap", "js_divergence", "probe_acc", "mia_loss_auc")


def beside(cell: dict[str, Any], figure: str) -> str:
    """A cell of the overview; bold where megu is better than the best of the others by the paired interval."""
    show, methods = COLUMNS[figure][1], cell["methods"]
    values = {name: mean for name, own in methods.items() if (mean := own["mean"].get(figure)) is not None}
    other = nearest(cell["methods"], figure, (*REFERENCES, *OURS))
    if "megu" not in values or other is None:
        return "–"
    told = [show(values["megu"]), f"{show(values[other])} ({other})"]
    told += [show(values["retrain"])] if "retrain" in values else ["–"]
    if verdict(methods[other]["paired"].get(figure)) == "better":
        told[0] = f"**{told[0]}**"
    return " / ".join(told)


def section(name: str, cell: dict[str, Any]) -> str:
    """All that is said of one request: what it is, the table of all methods, and the verdicts."""
    return "\n\n".join([f"### {name}", preamble(cell), table(cell), verdicts(cell)])


def preamble(cell: dict[str, Any]) -> str:
    """The request, the sizes, the seeds, and how much the original has memorised."""
    request, config, original = cell["request"], cell["config"], cell["methods"].get("original")
    what = f"forget {', '.join(request['concepts'])}" if request["concepts"] else "forget images at random"
    superclasses = config["data.superclasses"] or {}
    within = [group for group, members in superclasses.items() if {*members} & {*request["concepts"]}]
    lines = [
        f"{config['data.name']}, {config['model.name']}: {what}"
        + (f" within {', '.join(within)}" if within and request["kind"] == "subclasses" else "")
        + f"; {request['forget']:,} images of {request['forget'] + request['retain']:,}; seeds "
        + f"{', '.join(map(str, cell['seeds']))}; settings chosen on seed {cell['tuning']['seed']} with "
        + f"{cell['tuning']['images']:,} images; {cell['wall_seconds'] / 60:.0f} minutes."
    ]
    if original:
        train, test = original["mean"]["retain_train_acc"], original["mean"]["retain_test_acc"]
        if train is not None and test is not None:
            lines.append(
                f"The original is right on {percent(train)}% of retained training images and {percent(test)}% of "
                f"retained test images: a generalisation gap of {percent(train - test)} points."
            )
    if cell["noise_floor"] is not None:
        lines.append(f"Noise floor of the gap: {percent(cell['noise_floor'])}.")
    for method, seeds in cell["failed"].items():
        lines.append(f"**Failed:** {method}, seed {', '.join(seeds)}: {next(iter(seeds.values()))}.")
    return "\n".join(lines)


def table(cell: dict[str, Any]) -> str:
    """Methods as rows: mean ± half of the 95% interval, the best in bold."""
    methods = cell["methods"]
    shown = {
        figure: how
        for figure, how in COLUMNS.items()
        if any(figure in own for m in methods.values() for own in flat(m).values())
    }
    bold = {figure: nearest(cell["methods"], figure, REFERENCES) for figure in shown}
    head = ["", *(name for name, _ in shown.values()), "settings chosen"]
    lines = [row(head), row(["---"] * len(head))]
    for name, own in methods.items():
        texts = [value(own, figure, show) for figure, (_, show) in shown.items()]
        texts = [f"**{text}**" if bold[figure] == name else text for figure, text in zip(shown, texts, strict=True)]
        lines.append(row([f"`{name}`", *texts, tuned(cell, name)]))
    lines.append(
        "\nIn percent but for JS (nats) and epochs; mean ± half of the 95% interval. The best of a column is in bold "
        "(`original`, `retrain` and `mask` aside): the nearest to the oracle's figure of the same seed; of gap, JS and "
        "time the least. `retrain` is another oracle than the one that judges. Time is the share of retraining."
    )
    return "\n".join(lines)


def flat(method: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seed -> all figures that a method has there."""
    given = {seed: figures(own) for seed, own in method["seeds"].items()}
    return {seed: {name: number for name, number in row.items() if number is not None} for seed, row in given.items()}


def value(own: dict[str, Any], figure: str, show: Callable[[float], str]) -> str:
    """Mean ± interval; how often the class was not relearned, where there is no mean of the epochs."""
    mean, half = own["mean"].get(figure), own["interval"].get(figure)
    if mean is None:
        never = [seed for seed, of in own["seeds"].items() if of["metrics"].get("relearn_epochs", 0) is None]
        return f"never ({len(never)} of {len(own['seeds'])})" if figure == "relearn_epochs" and never else "–"
    return show(mean) + (f" ± {show(half)}" if half is not None and figure != "time_ratio" else "")


def tuned(cell: dict[str, Any], name: str) -> str:
    """The settings that were chosen for a method."""
    if name not in cell["tuned"]:
        return ""
    keys, used = cell["tuned"][name][0]["settings"], cell["methods"][name]["settings"]
    return ", ".join(f"{key.removeprefix('finetune.')} {used[key]}" for key in keys)


def verdict(pair: dict[str, Any] | None) -> str:
    """What a paired difference says of megu: better, worse, same, or (a single seed, no figure) unknown."""
    if not pair or pair["interval"] is None:
        return "unknown"
    if abs(pair["mean"]) < 1e-9:  # rounding, where both did the same
        return "same"
    low, high = pair["mean"] - pair["interval"], pair["mean"] + pair["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "same"


def verdicts(cell: dict[str, Any]) -> str:
    """A sentence per figure: what megu is better than, no different from and worse than."""
    lines = ["megu against each method, by the 95% interval of the paired differences over seeds:", ""]
    for figure, word in WORDS.items():
        found: dict[str, list[str]] = {"better": [], "same": [], "worse": []}
        for name, own in cell["methods"].items():
            said = verdict(own["paired"].get(figure))
            if said in found:
                found[said].append(f"{name} ({signed(own['paired'][figure], COLUMNS[figure][1])})")
        told = [
            f"{start} {', '.join(names)}"
            for start, names in (("better than", found["better"]), ("no different from", found["same"]),
                                 ("**worse than**", found["worse"]))
            if names
        ]  # fmt: skip
        if told:
            lines.append(f"- {word}: {'; '.join(told)}.")
    return "\n".join(lines) if len(lines) > 1 else "One seed, or no megu: nothing can be said of pairs."


def signed(pair: dict[str, Any], show: Callable[[float], str]) -> str:
    """A paired difference with its sign and interval."""
    return f"{'+' if pair['mean'] >= 0 else '−'}{show(abs(pair['mean']))} ± {show(pair['interval'])}"


def residue(name: str, cell: dict[str, Any]) -> str:
    """What is left of the forgotten: before, after megu, in the oracle, behind the mask, after the best baselines."""
    others = [n for n in cell["methods"] if n not in (*REFERENCES, *OURS)]
    ranked = sorted(others, key=lambda n: cell["methods"][n]["mean"].get("js_divergence") or math.inf)[:3]
    names = [n for n in ("original", "megu", "retrain", "mask", *ranked) if n in cell["methods"]]
    shown = {
        figure: how
        for figure, how in RESIDUE.items()
        if any(figure in own for n in names for own in flat(cell["methods"][n]).values())
    }
    lines = [f"**{name}**", "", row(["", *(word for word, _ in shown.values())]), row(["---"] * (len(shown) + 1))]
    for n in names:
        lines.append(row([f"`{n}`", *(value(cell["methods"][n], f, show) for f, (_, show) in shown.items())]))
    return "\n".join(lines)


def row(texts: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(texts)} |"


def draw_methods(cells: dict[str, Any], path: Path) -> None:
    """A panel per request: JS divergence across, distance of the probe (or the loss attack) to the oracle's up."""
    plt = pyplot()
    wide = min(len(cells), 4)
    high = math.ceil(len(cells) / wide)
    figure, axes = plt.subplots(high, wide, figsize=(3.4 * wide, 3.1 * high), squeeze=False, layout="constrained")
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    for axis, (name, cell) in zip(axes.flat, cells.items(), strict=False):
        oracle = flat(cell["methods"]["retrain"]) if "retrain" in cell["methods"] else {}
        depth = "probe_acc" if cell["request"]["kind"] in ("classes", "subclasses") else "mia_loss_auc"
        for method, own in cell["methods"].items():
            apart = [distances(own_figures, oracle.get(seed, {})) for seed, own_figures in flat(own).items()]
            pairs = [(d["js_divergence"], 100 * d[depth]) for d in apart if "js_divergence" in d and depth in d]
            if not pairs:
                continue
            x, y = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            colour = "tab:red" if method == "megu" else "tab:gray" if method in REFERENCES else "tab:blue"
            axis.plot(x, y, "o", color=colour, markersize=4)
            left = method in OURS  # off the others' names
            axis.annotate(
                method, (x, y), fontsize=6, xytext=(-3 if left else 3, 2), ha="right" if left else "left",
                textcoords="offset points", color=colour, weight="bold" if left else "normal",
            )  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("JS to the oracle, nats", fontsize=7)
        axis.set_ylabel(f"|{'probe' if depth == 'probe_acc' else 'loss AUC'} − oracle's|, points", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.margins(x=0.2, y=0.1)  # room for the names
        axis.set_xscale("log")  # the good ones lie close together
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_ylim(bottom=0)
    save(figure, path)


# -- the ablations -----------------------------------------------------------------------------------------------------


def of_ablations(result: dict[str, Any], out: Path) -> dict[str, str]:
    """Name -> Markdown of each block of the ablations, and their figures."""
    blocks = {}
    for name, found in result["requests"].items():
        draw_ablations(found, out / "figures" / f"ablations-{name}.svg")
        blocks[f"ablations-{name}"] = (
            f"{ablations(name, found)}\n\n![What each setting changes, {name}](figures/ablations-{name}.svg)"
        )
    return blocks


def ablations(name: str, found: dict[str, Any]) -> str:
    """Settings as rows; beside each figure of the main two what the paired interval says of the change."""
    request = found["request"]
    what = ", ".join(request["concepts"]) or f"{request['forget']:,} images at random"
    head = ["setting", *(word for word, _ in ABLATED.values()), "than the default, in gap / JS / probe / loss AUC"]
    lines = [
        f"Forget {what}; {found['images']:,} images; seeds {', '.join(map(str, found['seeds']))}.\n",
        row(head),
        row(["---"] * len(head)),
        row(["another oracle", *(value({**found["retrain"], "seeds": {}}, f, s) for f, (_, s) in ABLATED.items()), ""]),
    ]
    for label, own in found["settings"].items():
        texts = [value({**own, "seeds": {}}, figure, show) for figure, (_, show) in ABLATED.items()]
        # `better` is said of the default there, and of the setting here.
        words = {"better": "worse", "worse": "**better**", "same": "no different", "unknown": "–"}
        said = [words[verdict(own["from_default"].get(figure))] for figure in main_figures()]
        lines.append(row([f"`{label}`", *texts, " / ".join(said) if own["changes"] else ""]))
    return "\n".join(lines)


def draw_ablations(found: dict[str, Any], path: Path) -> None:
    """Paired differences to the default with their intervals: left of 0 is nearer to the oracle."""
    plt = pyplot()
    panels = {
        figure: word
        for figure, word in (("js_divergence", "JS, nats"), ("avg_gap", "gap"), ("probe_acc", "|probe − oracle's|"),
                             ("mia_loss_auc", "|loss AUC − oracle's|"))
        if any(figure in own["from_default"] for own in found["settings"].values())
    }  # fmt: skip
    labels = [label for label, own in found["settings"].items() if own["changes"]]
    if not labels or not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1.4, 0.17 * len(labels) + 1), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, word) in zip(axes.flat, panels.items(), strict=True):
        for place, label in enumerate(labels):
            if pair := found["settings"][label]["from_default"].get(name):
                colour = {"better": "tab:red", "worse": "tab:green"}.get(verdict(pair), "tab:gray")
                axis.errorbar(pair["mean"], place, xerr=pair["interval"] or 0, fmt="o", markersize=3, color=colour)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel(word, fontsize=7)
        axis.tick_params(labelsize=6)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    save(figure, path)


def pyplot() -> Any:
    """Matplotlib without a display, and with the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "megu", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as SVG on white, so that it is read on dark pages too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot().close(figure)


if __name__ == "__main__":
    main()
