"""The ratings as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megu_cli.artifacts import replacing
from megu_cli.mllm.base import SCALE


def draw(body: dict[str, Any], path: Path) -> str:
    """Write a PNG heat map of the ratings in similarity.json: asked concepts down, candidates across.

    Args:
        body: The artifact's body.
        path: Where the picture goes.

    Returns:
        The path.

    Raises:
        ArtifactError: It cannot be written.
    """
    import numpy as np
    from matplotlib.figure import Figure

    scores, names = body["scores"], body["classes"]
    values = np.array([[row.get(name, np.nan) for name in names] for row in scores.values()]).reshape(-1, len(names))
    figure = Figure(figsize=(2.5 + 0.35 * len(names), 2 + 0.35 * len(scores)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values, vmin=SCALE[0], vmax=SCALE[1], cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(scores)), list(scores))
    for (i, k), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(k, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 5 else "white", size=7)
    axes.set_title(f"similarity, rated by {body['rater']}", size=9)
    figure.colorbar(shown, ax=axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return str(path)
