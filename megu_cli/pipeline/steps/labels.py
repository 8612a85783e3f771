"""The perturbing labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from megu_cli.method import proxy
from megu_cli.method import unlearn as unlearning
from megu_cli.method.unlearn import Labels, UnlearningProblem
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.rehearsal import SAMPLED, Estimate, Rehearsal, few, seconds
from megu_cli.pipeline.steps.problem import problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def labels(context: RunContext, inputs: Inputs) -> Product:
    """A perturbing label, or a distribution over labels, for each forgotten sample."""
    given = problem(context)
    made = unlearning.perturb(given, context.original(), inputs["transition"].tensors["transition"])
    names = context.inputs.data.classes
    counts = torch.bincount(made.perturbing, minlength=len(names)).tolist()
    body: dict[str, Any] = {"mode": made.mode, "classes": names}
    if made.keep:
        body["keep"] = made.keep
    body["counts"] = {name: n for name, n in zip(names, counts, strict=True) if n}
    tensors = {"index": context.inputs.request.forget, "perturbing": made.perturbing}
    if made.target is not None:
        tensors["target"] = made.target
    if made.absent is not None:
        tensors["absent"] = made.absent
    notes = []
    if made.proxy:
        body["proxy"] = made.proxy
        if made.mode != "proxy":
            known = context.config.knows_near
            source = context.config.transition.source
            sources = f"the {source} and the prediction" if known else "the model's own prediction"
            notes.append(
                f"the proxy is right on {made.proxy['held_out_acc']:.0%} of the held-out images, the model on "
                f"{made.proxy['original_held_out_acc']:.0%}: labels come from {sources} instead"
            )
    if (
        made.keep
        and context.config.labels.keep == "auto"
        and context.inputs.user_model.foreign
        and not context.inputs.data.borrowed
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
    found = artifact.tensors
    return Labels(artifact.body["mode"], found["perturbing"], found.get("target"), absent=found.get("absent"))


def stand_in(given: UnlearningProblem) -> Labels:
    """Labels of the right form, for an estimate of a later stage."""
    classes = len(given.data.classes)
    labels = (given.true + 1) % classes
    target = None if given.label_mode == "hard" else functional.one_hot(labels, classes).float()
    return Labels(given.label_mode, labels, target)


def labels_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `labels` takes: predictions on D_f and, where labels need them, on held-out images; and the proxy."""
    given, inputs = rehearsal.problem, rehearsal.context.inputs
    number = len(inputs.request.forget)
    soft = 4 * len(inputs.data.classes) if given.label_mode != "hard" else 0
    predicted = given.label_mode == "proxy" or (given.label_mode != "hard" and given.labels.keep == "auto")
    images = number + (len(inputs.data.held_out) if predicted else 0)
    duration, steps = images * rehearsal.per_sample, 0
    if given.label_mode == "proxy":
        steps, asking = _proxy_estimate(rehearsal)
        duration += asking
    return Estimate(steps, 0, duration, rehearsal.predicting_bytes, number * (16 + soft))


def _proxy_estimate(rehearsal: Rehearsal) -> tuple[int, float]:
    """Steps and seconds of the proxy."""
    settings, inputs = rehearsal.problem.labels.proxy, rehearsal.context.inputs
    request, split, classes = inputs.request, inputs.data.train, len(inputs.data.classes)
    some = few(request.retain, SAMPLED)
    small = settings.model_copy(update={"networks": 1, "passes": 1})
    # One pass over some images, and their answers.
    per_sample = seconds(lambda: proxy.answers(split, some, split.view(some[:1]), classes, small)) / len(some)
    known = min(settings.images, len(request.retain))
    samples = proxy.passes(settings, known) * known * settings.networks
    return proxy.steps(settings, known), per_sample * (samples + len(request.forget))
