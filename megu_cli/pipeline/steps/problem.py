"""The forget request in the form that the method, the baselines and the evaluation take."""

from __future__ import annotations

from torch import nn

from megu_cli.baselines.task import BASELINE_EPOCHS, Task
from megu_cli.evaluation.measure import EvaluationProblem
from megu_cli.execution.runtime import seeded
from megu_cli.method.unlearn import UnlearningProblem
from megu_cli.pipeline.workspace import Workspace


def fresh(work: Workspace, purpose: str) -> nn.Module:
    """A newly initialised model: every random layer anew, another one for each purpose and seed."""
    with seeded(work.config.seed, purpose, "init"):
        return work.build()


def task(work: Workspace) -> Task:
    """The forget request as the baselines see it: an epoch is as long as one of the method's own finetuning."""
    given, request = problem(work), work.request
    return Task(
        split=work.data.train,
        retain=request.retain,
        forget=request.forget,
        validation=work.data.held_out.view(request.validation),
        forgotten=request.classes,
        classes=len(work.data.classes),
        fresh=lambda purpose: fresh(work, purpose),
        samples=given.retain_samples,
        batch=given.finetune.batch,
        forget_batch=given.forget_batch_in(BASELINE_EPOCHS),
        execution=work.execution,
    )


def problem(work: Workspace) -> UnlearningProblem:
    """The forget request and the method's settings."""
    config = work.config
    return UnlearningProblem(
        data=work.data,
        request=work.request,
        transition=config.transition,
        labels=config.labels,
        noise=config.noise,
        finetune=config.finetune,
        execution=work.execution,
    )


def evaluation_problem(work: Workspace) -> EvaluationProblem:
    """The forget request and the evaluation's settings."""
    return EvaluationProblem(
        work.data, work.request, work.config.eval, lambda purpose: fresh(work, purpose), work.execution
    )
