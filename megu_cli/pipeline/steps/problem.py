"""The forget request in the form that the method, the baselines and the evaluation take."""

from __future__ import annotations

from torch import nn

from megu_cli.baselines.task import BASELINE_EPOCHS, Task
from megu_cli.evaluation.measure import EvaluationProblem
from megu_cli.execution.runtime import seeded
from megu_cli.method.unlearn import UnlearningProblem
from megu_cli.pipeline.context import RunContext


def fresh(work: RunContext, purpose: str) -> nn.Module:
    """A newly initialised model: every random layer anew, another one for each purpose and seed."""
    with seeded(work.config.seed, purpose, "init"):
        return work.build()


def task(work: RunContext) -> Task:
    """The forget request as the baselines see it: an epoch is as long as one of the method's own finetuning."""
    given, request = problem(work), work.inputs.request
    return Task(
        split=work.inputs.data.train,
        retain=request.retain,
        forget=request.forget,
        validation=work.inputs.data.held_out.view(request.validation),
        forgotten=request.classes,
        classes=len(work.inputs.data.classes),
        fresh=lambda purpose: fresh(work, purpose),
        samples=given.retain_samples,
        batch=given.finetune.batch,
        forget_batch=given.forget_batch_in(BASELINE_EPOCHS),
        execution=work.execution,
    )


def problem(work: RunContext) -> UnlearningProblem:
    """The forget request and the method's settings."""
    config = work.config
    return UnlearningProblem(
        data=work.inputs.data,
        request=work.inputs.request,
        transition=config.transition,
        labels=config.labels,
        noise=config.noise,
        finetune=config.finetune,
        execution=work.execution,
    )


def evaluation_problem(work: RunContext) -> EvaluationProblem:
    """The forget request and the evaluation's settings."""
    return EvaluationProblem(
        work.inputs.data, work.inputs.request, work.config.eval, lambda purpose: fresh(work, purpose), work.execution
    )
