"""The ratings as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from megu_cli.mllm.base import SCALE
from megu_cli.run.writing import replacing
from megu_cli.text import short, shown

_CELL = 0.38  # inches


def draw(body: dict[str, Any], path: Path) -> str:
    """Write a PNG heat map of the ratings in similarity.json: asked concepts down, candidates across.

    The own class is left blank; ``?`` stands where a rating is missing.

    Args:
        body: The artifact's body.
        path: Where the picture goes.

    Returns:
        The path.

    Raises:
        ArtifactError: It cannot be written.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    body = shown(body)
    scores, names = body["scores"], body["classes"]
    values = np.array([[row.get(name, np.nan) for name in names] for row in scores.values()]).reshape(-1, len(names))
    width = 2.0 + _CELL * len(names)
    with mpl.rc_context({"text.parse_math": False}):  # a dollar sign in a name begins no formula
        figure = Figure(figsize=(width, 1.0 + _CELL * len(scores)))
        axes = figure.subplots()
        axes.set_facecolor("0.9")  # what was not rated
        axes.imshow(values, vmin=SCALE[0], vmax=SCALE[1], cmap="cividis")
        axes.set_xticks(
            range(len(names)), [short(name) for name in names], rotation=90 if max(map(len, names)) > 2 else 0, size=9
        )
        axes.set_yticks(range(len(scores)), [short(name) for name in scores], size=9)
        axes.tick_params(length=0)
        for (i, k), value in np.ndenumerate(values):
            rated = not np.isnan(value)
            text = f"{value:.0f}" if rated else "" if names[k] == list(scores)[i] else "?"
            axes.text(k, i, text, ha="center", va="center", color="white" if rated and value <= 5 else "black", size=9)
        title = f"How similar is the class on the left to the one below? Rated by {short(body['rater'])}"
        axes.set_title(textwrap.fill(title, max(24, int(13 * width))), size=9, loc="left")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": "megu"})
    return str(path)
