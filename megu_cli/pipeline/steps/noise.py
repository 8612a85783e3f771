"""The feature noise pair."""

from __future__ import annotations

from megu_cli.method import unlearn as unlearning
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.labels import loaded
from megu_cli.pipeline.steps.problem import problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def noise(work: RunContext, inputs: Inputs) -> Product:
    """The positive-negative feature noise pair."""
    given = problem(work)
    made = loaded(inputs["labels"])
    pair = unlearning.noise_pair(given, work.original(), made)
    return Product(Artifact({"use": given.noise_use(made.mode), "classes": work.inputs.data.classes}, pair))
