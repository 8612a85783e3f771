"""The ratings, and the transition matrix that is made from them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megu_cli.method import nearness
from megu_cli.method import unlearn as unlearning
from megu_cli.mllm.base import Ratings
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.rehearsal import Estimate, Rehearsal
from megu_cli.pipeline.steps.problem import problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def similarity(context: RunContext, inputs: Inputs) -> Product:
    """Ratings of how similar the forgotten concepts are to the retained ones."""
    asked = context.inputs.asked
    ratings = (
        context.inputs.rater.rate(asked) if asked else Ratings("nobody: a single candidate needs no rating", {}, {})
    )
    body = {
        "classes": context.inputs.data.concepts,
        "rater": ratings.rater,
        "scores": ratings.scores,
        "backend": context.config.mllm.backend,
        **ratings.provenance,
    }
    return Product(Artifact(body))


def transition(context: RunContext, inputs: Inputs) -> Product:
    """The transition matrix of the rated concepts."""
    candidates = {question.concept: question.candidates for question in context.inputs.questions}
    scores = inputs["similarity"].body["scores"]
    if not context.config.mllm.rater.rates:
        scores = {concept: dict.fromkeys(compared, 0.0) for concept, compared in candidates.items()}
    return Product(_matrix(context, unlearning.transition(problem(context), candidates, scores)))


def measured(context: RunContext, inputs: Inputs) -> Product:
    """The transition matrix from the original model, which no rater is asked for."""
    matrix = nearness.transition(problem(context), context.original())
    return Product(_matrix(context, matrix))


def _matrix(context: RunContext, matrix: Tensor) -> Artifact:
    body = {
        "rows": [context.inputs.data.concepts[c] for c in context.inputs.request.asked],
        "columns": context.inputs.data.classes,
    }
    return Artifact(body, {"transition": matrix})


def similarity_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `similarity` takes: calls only; to time one would mean to make it."""
    inputs = rehearsal.context.inputs
    size = sum(len(candidate) + 10 for question in inputs.questions for candidate in question.candidates)
    calls = inputs.rating_cost().calls
    return Estimate(0, calls, None if calls else 0.0, None, size)


def transition_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `transition` takes."""
    inputs = rehearsal.context.inputs
    return Estimate(disk_bytes=8 * len(inputs.request.asked) * len(inputs.data.classes))


def measured_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `measured` takes: predictions."""
    inputs = rehearsal.context.inputs
    places = nearness.images(inputs.data, inputs.request, rehearsal.problem.transition)
    seconds = sum(map(len, places.values())) * rehearsal.per_sample
    return replace(transition_estimate(rehearsal), seconds=seconds, memory_bytes=rehearsal.predicting_bytes)
