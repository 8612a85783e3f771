"""Training of the original model, and of the oracle."""

from __future__ import annotations

import math

import torch
from torch import nn

from megu_cli import training
from megu_cli.baselines.retrain import retrain
from megu_cli.execution import Execution
from megu_cli.models.sources import shown
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.rehearsal import STEPS, Estimate, Rehearsal, Stopwatch, timed
from megu_cli.pipeline.steps.problem import fresh, task
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def train(context: RunContext, inputs: Inputs) -> Product:
    """Train the original model on all training images but the held-out ones."""
    model = fresh(context, "train")
    index = torch.where(context.inputs.data.trainable)[0]
    history = training.train_classifier(
        model,
        context.inputs.data.train,
        index,
        context.config.train,
        label="train",
        execution=context.execution,
    )
    return _trained(context, model, len(index), history)


def oracle(context: RunContext, inputs: Inputs) -> Product:
    """Retrain from a true re-initialisation, without the forget set: the same recipe, the same passes."""
    # What is loaded into the model does not matter: every weight is initialised anew.
    model = context.build()
    history = retrain(model, task(context), context.config.train)
    return _trained(context, model, len(context.inputs.request.retain), history)


def _trained(context: RunContext, model: nn.Module, samples: int, history: training.History) -> Product:
    body = {
        "model": shown(context.config.model.name),
        "classes": context.inputs.data.classes,
        "samples": samples,
        "loss": history.loss,
        "validation_acc": history.validation,
    }
    return Product(Artifact(body, {key: value.cpu() for key, value in model.state_dict().items()}))


def train_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `train` takes."""
    return _estimate(rehearsal, int(rehearsal.context.inputs.data.trainable.sum()), validated=0)


def oracle_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `oracle` takes."""
    request = rehearsal.context.inputs.request
    return _estimate(rehearsal, len(request.retain), validated=len(request.validation))


def _estimate(rehearsal: Rehearsal, samples: int, validated: int) -> Estimate:
    context = rehearsal.context
    settings, model, split = context.config.train, rehearsal.model(), context.inputs.data.train
    brief = settings.model_copy(update={"epochs": 1, "lr": 1e-6, "weight_decay": 0.0})
    index = torch.arange(len(split)).repeat(1 + STEPS * settings.batch // len(split))

    def some_steps(watch: Stopwatch) -> None:
        some, execution = index[: (1 + STEPS) * settings.batch], Execution(context.runtime.device, track=watch)
        training.train_classifier(model, split, some, brief, label="plan", execution=execution)

    with rehearsal.peak() as memory:
        step = timed(some_steps)
    steps = settings.epochs * math.ceil(samples / settings.batch)
    seconds = steps * step + settings.epochs * validated * rehearsal.per_sample
    return Estimate(steps, 0, seconds, memory(), rehearsal.model_bytes)
