"""The forget request in the form that the method, the baselines and the evaluation take."""

from __future__ import annotations

import torch
from torch import nn

from megu_cli.baselines.task import BASELINE_EPOCHS, Task
from megu_cli.config.model_sources import source_of
from megu_cli.evaluation.measure import EvaluationProblem
from megu_cli.execution.runtime import seeded
from megu_cli.method.unlearn import UnlearningProblem
from megu_cli.pipeline.context import RunContext


def fresh(context: RunContext, purpose: str) -> nn.Module:
    """A newly initialised model: every random layer anew, another one for each purpose and seed."""
    with seeded(context.config.seed, purpose, "init"):
        return context.build()


def pretrained(context: RunContext) -> bool:
    """True if a new model holds trained weights.

    The user's code makes such a model, and another seed gives the same weights.
    """
    settings = context.config.model
    if not (source_of(settings.name)[0].pretrained or settings.trust_remote_code):
        return False
    first, second = (fresh(context, f"pretrained {n}") for n in range(2))
    pairs = zip(_weights(first), _weights(second), strict=True)
    # A layer that starts from a constant is none that was trained.
    return any(a.ndim > 1 and torch.equal(a, b) and len(a.unique()) > 1 for a, b in pairs)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a training may have set: the trainable ones, and those of frozen layers that start at random.

    Any other frozen parameter is a constant, such as a sin-cos position embedding.
    """
    return [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad or hasattr(module, "reset_parameters")
    ]


def task(context: RunContext) -> Task:
    """The forget request as the baselines see it: an epoch is as long as one of the method's own finetuning."""
    given, request = problem(context), context.inputs.request
    return Task(
        split=context.inputs.data.train,
        retain=request.retain,
        forget=request.forget,
        validation=context.inputs.data.held_out.view(request.validation),
        forgotten=request.classes,
        classes=len(context.inputs.data.classes),
        fresh=lambda purpose: fresh(context, purpose),
        samples=given.retain_samples,
        batch=given.finetune.batch,
        forget_batch=given.forget_batch_in(BASELINE_EPOCHS),
        execution=context.execution,
    )


def problem(context: RunContext) -> UnlearningProblem:
    """The forget request and the method's settings."""
    config = context.config
    return UnlearningProblem(
        data=context.inputs.data,
        request=context.inputs.request,
        transition=config.transition,
        labels=config.labels,
        noise=config.noise,
        finetune=config.finetune,
        execution=context.execution,
    )


def evaluation_problem(context: RunContext) -> EvaluationProblem:
    """The forget request and the evaluation's settings."""
    return EvaluationProblem(
        context.inputs.data,
        context.inputs.request,
        context.config.eval,
        lambda purpose: fresh(context, purpose),
        context.execution,
    )
