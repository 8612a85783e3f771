"""The final layer of a classifier and the features before it; a model evaluated, followed or frozen for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from megu_cli.errors import CheckpointError, ConfigError


def has_head(model: nn.Module, classes: int) -> bool:
    """Whether the model has a classifier, so that there are penultimate features."""
    return bool(_heads(model, classes))


def heads(model: nn.Module, classes: int) -> list[nn.Module]:
    """The layers that may be the classifier: linear (or 1x1 convolution) with one output per class.

    Where there is none, a layer of the model's own kind whose ``weight`` has a row per class, such as a cosine
    classifier or a head tied to an embedding.

    Raises:
        CheckpointError: The model has no such layer.
    """
    if not (found := _heads(model, classes)):
        raise CheckpointError(f"the model has no final layer with {classes} outputs")
    return found


def _heads(model: nn.Module, classes: int) -> list[nn.Module]:
    modules = list(model.modules())
    found: list[nn.Module] = [
        m
        for m in modules
        if isinstance(m, (nn.Linear, nn.Conv2d))
        and (m.out_features if isinstance(m, nn.Linear) else m.out_channels) == classes
    ]
    return found or [
        m
        for m in modules
        if isinstance(weight := getattr(m, "weight", None), Tensor) and weight.ndim == 2 and len(weight) == classes
    ]


def classifier(model: nn.Module, classes: int) -> nn.Module:
    """The last of the model's `heads`.

    Raises:
        CheckpointError: The model has no such layer.
    """
    return heads(model, classes)[-1]


@contextlib.contextmanager
def penultimate(model: nn.Module, classes: int, attached: bool = False) -> Iterator[list[Tensor]]:
    """Collect the classifier's inputs, as (B, D), of each forward pass in the block.

    Where several layers have an output per class, the one that ran last in a pass is the classifier.

    Args:
        model: The model.
        classes: Number of classes K.
        attached: Keep them in the graph, for a loss on them.

    Raises:
        CheckpointError: The model has no such layer.
    """
    collected: list[Tensor] = []
    latest: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest[:] = inputs[:1]

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if latest:
            x = latest.pop()
            # Maps are averaged over positions, sequences over tokens.
            x = (x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x).flatten(1)
            collected.append(x if attached else x.detach())

    handles = [head.register_forward_pre_hook(note) for head in heads(model, classes)]
    handles.append(model.register_forward_hook(keep))
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a block; after it the model is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """For a block, batch norm's running statistics follow as fast as torch's default lets them, or faster.

    Some networks are made for long trainings (torchvision's MobileNetV3 has a momentum of 0.01): after the hundred
    steps of an unlearning their statistics would still be those of the weights before it.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is not None]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = max(layer.momentum or 0.0, 0.1)
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


@contextlib.contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """After the block, the model's buffers, such as batch norm's running statistics, are as they were before it."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients for a block; all is restored after it."""
    needed = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with evaluating(model.requires_grad_(False)):
            yield
    finally:
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)


def check_outputs(logits: Tensor, classes: int) -> None:
    """See that a model gives one logit for each class.

    Raises:
        ConfigError: It does not.
    """
    if logits.ndim != 2:
        raise ConfigError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])} for an image, not one for each of the "
            f"{classes:,} classes",
            "Check model.name.",
        )
    if logits.shape[1] != classes:
        raise ConfigError(
            f"the model has {logits.shape[1]:,} outputs, and the data have {classes:,} classes",
            outputs_hint(logits.shape[1], classes),
        )


def outputs_hint(outputs: int, classes: int) -> str:
    """What to do where a model has other classes than the data."""
    if outputs > classes:
        return (
            f"Name all {outputs:,} classes of the model in model.classes, in the order of its outputs, also those "
            "without images (a list, or a file with a name a line). Of a named data set check data.superclasses."
        )
    return "Check data.name, data.superclasses and model.name: each class of the data needs an output."
