"""The forget request in the form that the method and the baselines take."""

from __future__ import annotations

from megu_cli.baselines.task import BASELINE_EPOCHS, Task
from megu_cli.method.unlearn import Problem
from megu_cli.pipeline import measuring
from megu_cli.pipeline.workspace import Workspace


def task(work: Workspace) -> Task:
    """The forget request as the baselines see it: an epoch is as long as one of the method's own finetuning."""
    given, request = problem(work), work.request
    return Task(
        split=work.data.train,
        retain=request.retain,
        forget=request.forget,
        validation=request.validation,
        forgotten=request.classes,
        classes=len(work.data.classes),
        fresh=lambda purpose: measuring.fresh(work, purpose),
        samples=given.retain_samples,
        batch=given.finetune.batch,
        forget_batch=given.forget_batch_in(BASELINE_EPOCHS),
        seed=work.config.seed,
        eval_batch=work.eval_batch,
        device=work.device,
        track=work.track,
    )


def problem(work: Workspace) -> Problem:
    """The forget request and the method's settings."""
    config = work.config
    return Problem(
        data=work.data,
        request=work.request,
        transition=config.transition,
        labels=config.labels,
        noise=config.noise,
        finetune=config.finetune,
        seed=config.seed,
        eval_batch=work.eval_batch,
        device=work.device,
        checkpoints=work.checkpoints,
        crew=work.crew,
        track=work.track,
    )
