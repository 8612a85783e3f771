"""The perturbing labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megu_cli.method import unlearn as unlearning
from megu_cli.method.unlearn import Labels
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def labels(work: RunContext, inputs: Inputs) -> Product:
    """A perturbing label, or a distribution over labels, for each forgotten sample."""
    given = problem(work)
    made = unlearning.perturb(given, work.original(), inputs["transition"].tensors["transition"])
    names = work.inputs.data.classes
    counts = torch.bincount(made.perturbing, minlength=len(names)).tolist()
    body: dict[str, Any] = {"mode": made.mode, "classes": names}
    if made.keep:
        body["keep"] = made.keep
    body["counts"] = {name: n for name, n in zip(names, counts, strict=True) if n}
    tensors = {"index": work.inputs.request.forget, "perturbing": made.perturbing}
    if made.target is not None:
        tensors["target"] = made.target
    notes = []
    if made.proxy:
        body["proxy"] = made.proxy
        if made.mode != "proxy":
            rated = work.config.mllm.backend != "none"
            sources = "the ratings and the prediction" if rated else "the model's own prediction"
            notes.append(
                f"the proxy is right on {made.proxy['held_out_acc']:.0%} of the held-out images, the model on "
                f"{made.proxy['original_held_out_acc']:.0%}: labels come from {sources} instead"
            )
    if (
        made.keep
        and work.config.labels.keep == "auto"
        and work.inputs.user_model.foreign
        and not work.inputs.data.borrowed
    ):
        notes.append(
            f"the forgotten images keep {_kept(made.keep)} of their labels, as much as the model gives those of the "
            "images that data.validation holds out; if it was trained on these as well, take them from the test split "
            "with data.validation_from"
        )
    return Product(Artifact(body, tensors), notes=notes)


def _kept(keep: Mapping[str, float]) -> str:
    """Shares in words."""
    low, high = min(keep.values()), max(keep.values())
    return f"{high:.0%}" if low == high else f"{low:.0%} to {high:.0%}"


def loaded(artifact: Artifact) -> Labels:
    """The perturbing labels in the artifact of this stage."""
    return Labels(artifact.body["mode"], artifact.tensors["perturbing"], artifact.tensors.get("target"))
