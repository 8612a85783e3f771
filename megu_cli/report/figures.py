"""The report's figures by matplotlib: each a function of plain data and a look, drawn on transparent ground.

Every figure is drawn for light and for dark pages, for wide and for narrow ones, as SVG whose letters are outlines:
it looks the same everywhere and asks for no font.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from megu_cli.report.drawing import Look, bare
from megu_cli.text import short

Array = np.ndarray[Any, Any]


def per_class(
    names: Sequence[str],
    series: dict[str, Sequence[float | None]],
    forgotten: set[int],
    near: dict[int, str],
    called: str,
    look: Look,
) -> Figure:
    """Accuracy of each class before and after on the left, the change of the kept ones on the right.

    Args:
        names: Of the classes, from top to bottom.
        series: Model -> accuracy of each class.
        forgotten: Positions of the forgotten classes.
        near: Position -> note, for the classes nearest to the forgotten ones.
        called: What the new model is called.
        look: How to draw it.
    """
    rows = len(names)
    figure = Figure(figsize=(look.width, 0.3 * rows + 1.25), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1] if look.narrow else [1.7, 1])
    y = np.arange(rows)
    values = {m: np.array([np.nan if v is None else 100 * v for v in told]) for m, told in series.items()}
    before, after, target = values["original"], values["unlearned"], values.get("oracle")
    for row in {*near, *forgotten}:
        colour = look.forgotten if row in forgotten else look.palette[0]
        for axes in (left, right):
            axes.axhspan(row - 0.46, row + 0.46, color=colour, alpha=0.13 if look.dark else 0.09, lw=0)
    left.hlines(y, before, after, color=look.faint, lw=1.6, zorder=2)
    # A ring round the dot where nothing changed.
    left.scatter(before, y, s=90, facecolor="none", edgecolor=look.faint, lw=1.5, zorder=4, label="original")
    colours = [look.forgotten if row in forgotten else look.palette[0] for row in range(rows)]
    left.scatter(after, y, s=40, c=colours, zorder=5, lw=0)
    left.scatter([], [], s=40, c=look.palette[0], label=called)
    left.set_xlim(-4, 104)
    left.set_xlabel("test images recognised, %")

    kept = np.array([row not in forgotten for row in range(rows)])
    change = after - before
    right.barh(y[kept], change[kept], height=0.44, color=look.palette[0], zorder=3)
    right.axvline(0, color=look.faint, lw=1)
    shown = change[kept]
    if target is not None:
        for axes, at, rows_ in ((left, target, kept | True), (right, target - before, kept)):
            axes.scatter(at[rows_], y[rows_], s=150, marker="|", c=look.ink, lw=1.6, zorder=6)
        left.scatter([], [], s=150, marker="|", c=look.ink, lw=1.6, label="retrained")
        shown = np.concatenate([shown, (target - before)[kept]])
    reach = 1.15 * max(float(np.nanmax(np.abs(shown), initial=0)), 2.0)
    right.set_xlim(-reach, reach)
    right.set_xlabel("change, points" if look.narrow else "change of the kept classes, points")
    for row in forgotten:
        right.text(0, row, " forgotten", va="center", color=look.forgotten, fontsize="small")

    labels = [f"{name}  {near[row]}" if row in near else name for row, name in enumerate(names)]
    left.set_yticks(y, [short(s, 14 if look.narrow else 34) for s in labels])
    for row, tick in enumerate(left.get_yticklabels()):
        tick.set_fontweight("bold" if row in forgotten or row in near else "normal")
        if row in forgotten:
            tick.set_color(look.forgotten)
    left.set_ylim(rows - 0.4, -0.6)
    for axes in (left, right):
        axes.grid(axis="x", color=look.line, lw=0.8)
        axes.set_axisbelow(True)
        bare(axes)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.2)
    return figure


def flow(paths: list[tuple[str, str | None, str, int]], look: Look) -> Figure:
    """Ribbons from the old label over the perturbing label to the new prediction.

    Args:
        paths: (old label, perturbing label or ``None``, prediction, images).
        look: How to draw it.
    """
    heads = ["old label", "perturbing label", "says now"]
    stages = [0, 1, 2] if all(path[1] is not None for path in paths) else [0, 2]
    limit = 5 if look.narrow else 8
    grouped: Counter[tuple[str, ...]] = Counter()
    tops = []
    for stage in stages:
        counts: Counter[str] = Counter()
        for path in paths:
            counts[str(path[stage])] += path[3]
        names = [name for name, _ in counts.most_common()]
        tops.append(names if len(names) <= limit else names[: limit - 1])
    for path in paths:
        key = tuple(str(path[s]) if str(path[s]) in top else "others" for s, top in zip(stages, tops, strict=True))
        grouped[key] += path[3]
    total = sum(grouped.values())
    names = [name for name, _ in _tally(grouped, len(stages) - 1)]
    colour = dict(zip((n for n in names if n != "others"), look.palette, strict=False))
    most = max(len({key[i] for key in grouped}) for i in range(len(stages)))
    figure = Figure(figsize=(look.width, max(2.6, 0.42 * most + 1.4)), layout="constrained")
    axes = figure.subplots()
    gap, line = 0.03 * total, 0.06 * total
    bar = 0.05 if look.narrow else 0.028
    xs = np.linspace(0, 1, len(stages))
    at: list[dict[str, list[float]]] = []
    reach = 0.0
    for position in range(len(stages)):
        tally = _tally(grouped, position)
        # Thin ribbons stand further apart, so that their labels do not touch.
        gaps = [max(gap, line - (a[1] + b[1]) / 2) for a, b in itertools.pairwise(tally)]
        low = (total + sum(gaps)) / 2
        reach = max(reach, low)
        places = {}
        for (name, n), after in zip(tally, [*gaps, 0.0], strict=True):
            places[name] = [low, low]  # next ribbon leaves here, next arrives here
            tint = colour.get(name, look.faint) if position else look.faint
            axes.add_patch(Rectangle((xs[position] - bar / 2, low - n), bar, n, color=tint, lw=0, zorder=3))
            last = position == len(stages) - 1
            first = position == 0
            label = f"{short(name, 12 if look.narrow else 22)} ({n:,})"
            x = xs[position] + (-bar if first else bar if last else 0)
            if first or last:
                axes.text(x, low - n / 2, label, ha="right" if first else "left", va="center", zorder=6)
            else:
                box = {"boxstyle": "round,pad=0.25", "fc": look.page, "ec": "none", "alpha": 0.86}
                axes.text(x, low - n / 2, label, ha="center", va="center", zorder=6, bbox=box, fontsize="small")
            low -= n + after
        at.append(places)
    order = [[name for name, _ in _tally(grouped, i)] for i in range(len(stages))]
    for left in range(len(stages) - 1):
        links: Counter[tuple[str, str, str]] = Counter()
        for key, n in grouped.items():
            links[key[left], key[left + 1], key[-1]] += n
        right = left + 1
        for (a, b, end), n in sorted(
            links.items(), key=lambda i: (order[left].index(i[0][0]), order[right].index(i[0][1]), i[0][2])
        ):
            x0, x1 = xs[left] + bar / 2, xs[right] - bar / 2
            y0, y1 = at[left][a][0], at[right][b][1]
            middle = (x0 + x1) / 2
            points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1), (x1, y1 - n),
                      (middle, y1 - n), (middle, y0 - n), (x0, y0 - n), (x0, y0)]  # fmt: skip
            codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
            alpha = 0.5 if look.dark else 0.42
            axes.add_patch(PathPatch(Path(points, codes), fc=colour.get(end, look.faint), lw=0, alpha=alpha, zorder=2))
            at[left][a][0] -= n
            at[right][b][1] -= n
    side = 0.42 if look.narrow else 0.2
    axes.set_xlim(-side, 1 + side)
    for x, stage in zip(xs, stages, strict=True):
        axes.text(x, reach + 0.05 * total, heads[stage], ha="center", va="bottom", color=look.faint, fontsize="small")
    axes.set_ylim(-reach - 0.02 * total, reach + 0.14 * total)
    axes.axis("off")
    return figure


def _tally(grouped: Counter[tuple[str, ...]], position: int) -> list[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for key, n in grouped.items():
        counts[key[position]] += n
    return sorted(counts.items(), key=lambda item: (item[0] == "others", -item[1], item[0]))


def similarity(rows: list[str], columns: list[str], ratings: Array, weights: Array, look: Look) -> Figure:
    """The ratings as a heat map, with the transition matrix's weights beneath them.

    Args:
        rows: Forgotten concepts.
        columns: What they were compared with.
        ratings: (rows, columns) from 0 to 10, NaN where there is none.
        weights: (rows, columns) of the transition matrix, NaN where there is none.
        look: How to draw it.
    """
    turned = look.narrow
    if turned:
        rows, columns, ratings, weights = columns, rows, ratings.T, weights.T
    height = (0.36 if turned else 0.55) * len(rows) + 1.0
    figure = Figure(figsize=(look.width, height), layout="constrained")
    axes = figure.subplots()
    ends = ["#171c28", "#2a5a9c", "#7cc0ff"] if look.dark else ["#f4f6fb", "#9cc3f5", "#1f57ad"]
    colours = LinearSegmentedColormap.from_list("megu", ends)
    axes.pcolormesh(ratings, cmap=colours, vmin=0, vmax=10, edgecolors=look.page, linewidth=2)
    for i, j in np.ndindex(*ratings.shape):
        if np.isnan(ratings[i, j]):
            continue
        light = np.dot(colours(ratings[i, j] / 10)[:3], (0.2126, 0.7152, 0.0722)) > 0.42
        ink = "#10151f" if light else "#ffffff"
        axes.text(j + 0.5, i + (0.5 if np.isnan(weights[i, j]) else 0.36), f"{ratings[i, j]:.3g}",
                  ha="center", va="center", color=ink, fontweight="bold")  # fmt: skip
        if not np.isnan(weights[i, j]):
            axes.text(j + 0.5, i + 0.72, f"{100 * weights[i, j]:.0f}%",
                      ha="center", va="center", color=ink, fontsize="x-small")  # fmt: skip
    axes.set_xticks(np.arange(len(columns)) + 0.5, [short(c, 12) for c in columns])
    if max(map(len, columns), default=0) > 4 and len(columns) > 4:
        axes.tick_params(axis="x", labelrotation=35)
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("left")
            tick.set_rotation_mode("anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, [short(r, 18) for r in rows])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", colors=look.ink)
    axes.invert_yaxis()
    bare(axes)
    return figure


def mosaic(rows: list[tuple[str, list[tuple[str, Array]]]], look: Look) -> Figure:
    """Rows of small pictures.

    Args:
        rows: (name of the row, its pictures as (title, (C, H, W) array)); a picture with values below 0 is a noise
            and drawn around grey, others are images from 0 to 1.
        look: How to draw it.
    """
    columns = 4 if look.narrow else 8
    side = (look.width - (0.1 if look.narrow else 1.5)) / columns
    tight = ConstrainedLayoutEngine(h_pad=0.02, w_pad=0.03, hspace=0, wspace=0)
    # Room above a row for its titles, and on a phone for its name.
    above = [0.2 * any(title for title, _ in pictures) + 0.22 * look.narrow for _, pictures in rows]
    figure = Figure(figsize=(look.width, sum(side + room + 0.08 for room in above)), layout=tight)
    ratios = [side + room for room in above]
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=ratios)
    for (name, pictures), line in zip(rows, grid, strict=True):
        for column, axes in enumerate(line):
            axes.axis("off")
            if column >= len(pictures):
                continue
            title, picture = pictures[column]
            _picture(axes, picture)
            if title:
                axes.set_title(short(title, 13), fontsize="x-small", fontweight="normal", pad=3)
        if look.narrow:
            up = 1.24 if any(title for title, _ in pictures) else 1.05
            line[0].text(0, up, name, transform=line[0].transAxes, fontsize="small", fontweight="bold")
        else:
            line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontweight="bold")
    return figure


def _picture(axes: Axes, picture: Array) -> None:
    if picture.min() < 0:
        reach = float(np.abs(picture).max()) or 1.0
        if len(picture) == 1:
            axes.imshow(picture[0], cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
            return
        picture = 0.5 + picture / (2 * reach)
    picture = picture.clip(0, 1)
    if len(picture) == 1:
        axes.imshow(picture[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")


def histograms(models: dict[str, dict[str, dict[str, Any]]], names: dict[str, str], look: Look) -> Figure:
    """Loss and entropy of forgotten, retained and unseen images under each model.

    Args:
        models: Model -> group -> what `evaluation.aggregates.histograms` gives.
        names: Model -> its name.
        look: How to draw it.
    """
    measures = {"loss": "← surer      loss, nats", "entropy": "← surer      entropy, nats"}
    shape = (len(models), 2) if look.narrow else (2, len(models))
    figure = Figure(figsize=(look.width, 1.55 * shape[0] + 0.7), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False, sharey=False)
    styles = {
        "retained": (look.faint, "retained (seen)", "-"),
        "unseen": (look.palette[0], "unseen, same classes", (0, (4, 1.5))),
        "forgotten": (look.forgotten, "forgotten", "-"),
    }
    for m, (model, groups) in enumerate(models.items()):
        for k, (measure, title) in enumerate(measures.items()):
            axes = grid[m, k] if look.narrow else grid[k, m]
            for group, (colour, label, dash) in styles.items():
                told = groups[group][measure]
                counts = np.array(told["counts"], dtype=float)
                share = 100 * counts / max(counts.sum(), 1)
                edges = np.linspace(told["low"], told["high"], len(counts) + 1)
                fill = group == "retained"
                if fill:
                    axes.stairs(share, edges, fill=True, color=colour, alpha=0.3, lw=0, label=label)
                else:
                    axes.stairs(share, edges, color=colour, lw=1.7, linestyle=dash, label=label)
            ticks = [t for t in (-6, -4, -2, 0) if told["low"] <= t <= told["high"]]
            axes.set_xticks(ticks, [rf"$10^{{{t}}}$" if t else "1" for t in ticks])
            axes.tick_params(axis="y", labelsize="x-small", colors=look.faint)
            axes.tick_params(axis="x", labelsize="small")
            axes.set_ylim(0, None)
            axes.grid(axis="y", color=look.line, lw=0.6)
            axes.set_axisbelow(True)
            bare(axes)
            if look.narrow:
                axes.set_title(f"{names[model]}: {measure}", fontsize="small")
            else:
                if k == 0:
                    axes.set_title(names[model])
                if m == 0:
                    axes.set_ylabel("% of images", fontsize="small", color=look.faint)
                axes.set_xlabel(title, fontsize="small", color=look.faint)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2 if look.narrow else 3, frameon=False,
                  columnspacing=1.2, handlelength=1.6)  # fmt: skip
    return figure


def planes(
    models: dict[str, Array],
    labels: Array,
    classes: list[str],
    forgotten: list[int],
    near: list[int],
    names: dict[str, str],
    look: Look,
) -> Figure:
    """Unseen images in each model's plane of inner features, with the forgotten classes and their neighbours coloured.

    Args:
        models: Model -> (N, 2) points.
        labels: (N,) classes of the points.
        classes: Names.
        forgotten: Wholly forgotten classes.
        near: The classes nearest to them.
        names: Model -> its name.
        look: How to draw it.
    """
    shape = (len(models), 1) if look.narrow else (1, len(models))
    coloured = dict.fromkeys(forgotten, look.forgotten) | dict(zip(near, look.palette, strict=False))
    drawn = np.unique(labels).tolist()
    if not coloured:
        coloured = dict(zip(drawn, look.palette, strict=False))
    everything = np.concatenate(list(models.values()))
    low, high = everything.min(0), everything.max(0)
    # All panels alike, no flatter than 1:2, with a margin.
    middle, half = (low + high) / 2, 0.56 * (high - low) + 1e-6
    half = np.maximum(half, half[::-1] / 2)
    low, high, ratio = middle - half, middle + half, float(half[1] / half[0])
    height = shape[0] * (ratio * (look.width - 0.1) / shape[1] + 0.35)
    figure = Figure(figsize=(look.width, height), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False).ravel()
    for (model, points), axes in zip(models.items(), grid, strict=True):
        for c in sorted(drawn, key=lambda c: (c in coloured, c in forgotten)):
            here = points[labels == c]
            colour = coloured.get(c, look.faint)
            strong = c in coloured
            axes.scatter(*here.T, s=11 if strong else 7, color=colour, alpha=0.8 if strong else 0.35, lw=0,
                         rasterized=True, zorder=3 + (c in forgotten) if strong else 2)  # fmt: skip
            if strong or len(drawn) <= 12:
                x, y = np.median(here, 0)
                box = {"boxstyle": "round,pad=0.22", "fc": look.page, "ec": colour, "lw": 0.9, "alpha": 0.9}
                axes.text(x, y, short(classes[c], 14), ha="center", va="center", fontsize="small", zorder=7,
                          bbox=box, fontweight="bold" if c in forgotten else "normal")  # fmt: skip
        axes.set_title(names[model])
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(look.line)
    return figure
