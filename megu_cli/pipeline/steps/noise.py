"""The feature noise pair."""

from __future__ import annotations

from dataclasses import replace

from megu_cli.method import unlearn as unlearning
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.rehearsal import STEPS, Estimate, Rehearsal, timed, watched
from megu_cli.pipeline.steps.labels import loaded, stand_in
from megu_cli.pipeline.steps.problem import problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def noise(context: RunContext, inputs: Inputs) -> Product:
    """The positive-negative feature noise pair."""
    given = problem(context)
    made = loaded(inputs["labels"])
    pair = unlearning.noise_pair(given, context.original(), made)
    return Product(Artifact({"use": given.noise_use(made.mode), "classes": context.inputs.data.classes}, pair))


def noise_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `noise` takes."""
    given, data = rehearsal.problem, rehearsal.context.inputs.data
    use = given.noise_use(given.label_mode)
    kinds = {"both": 2, "none": 0}.get(use, 1)
    if not kinds:
        return Estimate()
    small = replace(given, noise=given.noise.model_copy(update={"steps": 1 + STEPS}))
    model, labels = rehearsal.model(), stand_in(given)
    with rehearsal.peak() as memory:
        step = timed(lambda watch: unlearning.noise_pair(watched(small, watch), model, labels))
    image = data.train.images[0].shape[1:].numel() * data.channels
    groups = given.true.unique().numel()
    if use in ("both", "positive"):
        groups += min(len(data.classes) - 1, len(given.true))
    steps = kinds * given.noise.steps
    return Estimate(steps, 0, steps * step, memory(), 4 * groups * given.noise.batch * image)
