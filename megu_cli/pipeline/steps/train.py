"""Training of the original model, and of the oracle."""

from __future__ import annotations

import torch
from torch import nn

from megu_cli import training
from megu_cli.baselines.retrain import retrain
from megu_cli.models.sources import shown
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import fresh, task
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run.artifacts import Artifact


def train(work: RunContext, inputs: Inputs) -> Product:
    """Train the original model on all training images but the held-out ones."""
    model = fresh(work, "train")
    index = torch.where(work.inputs.data.trainable)[0]
    history = training.train_classifier(
        model,
        work.inputs.data.train,
        index,
        work.config.train,
        label="train",
        execution=work.execution,
    )
    return _trained(work, model, len(index), history)


def oracle(work: RunContext, inputs: Inputs) -> Product:
    """Retrain from a true re-initialisation, without the forget set: the same recipe, the same passes."""
    # What is loaded into the model does not matter: every weight is initialised anew.
    model = work.build()
    history = retrain(model, task(work), work.config.train)
    return _trained(work, model, len(work.inputs.request.retain), history)


def _trained(work: RunContext, model: nn.Module, samples: int, history: training.History) -> Product:
    body = {
        "model": shown(work.config.model.name),
        "classes": work.inputs.data.classes,
        "samples": samples,
        "loss": history.loss,
        "validation_acc": history.validation,
    }
    return Product(Artifact(body, {key: value.cpu() for key, value in model.state_dict().items()}))
