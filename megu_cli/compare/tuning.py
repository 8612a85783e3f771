"""The settings that are tried for a method, their score on held-out images, and the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megu_cli.baselines import methods
from megu_cli.compare.methods import OURS
from megu_cli.errors import ConfigError, MeguError
from megu_cli.pipeline.context import RunContext

if TYPE_CHECKING:
    from torch import nn


def score(model: nn.Module, context: RunContext) -> float:
    """What tuning maximises; see `Arena.trial`.

    Raises:
        ConfigError: There are no held-out images.
    """
    import torch

    from megu_cli.training import accuracy

    data, request, execution = context.inputs.data, context.inputs.request, context.execution.unshared
    if not len(request.validation):
        raise ConfigError("--tune selects on held-out images, and there are none", "Raise data.validation.")
    forgotten = accuracy(model, data.train, request.forget, execution)
    target = 0.0
    labels = data.train.labels[request.forget]
    staying = labels[~torch.isin(labels, torch.tensor(request.classes, dtype=torch.int64))]
    if len(staying):  # of a class that is wholly forgotten nothing is right
        held_out = request.held_out(data)
        same = held_out[torch.isin(data.held_out.labels[held_out], staying)]
        same = same if len(same) else request.validation
        target = accuracy(model, data.held_out, same, execution) * len(staying) / len(labels)
    return accuracy(model, data.held_out, request.validation, execution) - abs(forgotten - target)


def grid(name: str, kind: str) -> Sequence[Mapping[str, Any]]:
    """The settings that are tried for a method and a kind of request; see `megu_cli.request.resolve.Kind`."""
    if name in OURS:
        # The score sees no features, so the adversary is not among them.
        weights, rates = ("auto", 0.4), (OURS[name].get("finetune.lr", "auto"), 0.05)
        return [{"finetune.weight": weight, "finetune.lr": lr} for weight in weights for lr in rates]
    return methods()[name].grid


def winner(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings with the best score; the first of equals, since a grid begins with its gentlest point.

    Raises:
        MeguError: The method failed with all of them.
    """
    if all(trial["score"] is None for trial in trials):
        raise MeguError("it failed with every setting that was tried", "What it said stands above.")
    best = max(trials, key=lambda trial: -math.inf if trial["score"] is None else trial["score"])
    return dict(best["settings"])


def described(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())
