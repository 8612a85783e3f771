"""A model by its name: checked, built, and tried out, wherever it comes from."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megu_cli.config.model_sources import source_of
from megu_cli.data.decode import Preprocessing
from megu_cli.errors import CheckpointError, ConfigError
from megu_cli.models.architecture import Architecture
from megu_cli.models.features import check_outputs, frozen, has_head, heads, penultimate


def _architecture(name: str, trust_remote_code: bool = False) -> Architecture:
    """The model that a value of ``model.name`` names; its source's class is imported now."""
    source, short = source_of(name)
    module, _, kind = source.architecture.partition(":")
    made: Architecture = getattr(importlib.import_module(f"megu_cli.models.{module}"), kind)(
        name, short, trust_remote_code
    )
    return made


def check_name(name: str) -> None:
    """See that there is such a model, as far as that can be told without making it.

    Raises:
        ConfigError: There is none; those that there are are named.
    """
    _architecture(name).check()


def build(name: str, classes: int, channels: int, trust_remote_code: bool = False) -> nn.Module:
    """A freshly initialised model whose output is its logits, from torch's global random state.

    Args:
        name: ``small_cnn``, ``small_resnet``, ``resnet18``, ``torchvision:NAME``, ``timm:NAME``, ``hf:DIRECTORY`` or
            ``python:MODULE:FACTORY``; a factory may return trained weights, and then they are where it starts.
        classes: Number of classes K.
        channels: Channels of the images.
        trust_remote_code: Whether code in a ``hf:`` directory may run.

    Raises:
        ConfigError: There is no such model, or it cannot be made.
    """
    architecture = _architecture(name, trust_remote_code)
    architecture.check()
    model = architecture.build(classes, channels)
    model.register_forward_hook(_as_logits)
    return model.to(memory_format=torch.channels_last)


def channels_of(name: str, trust_remote_code: bool = False) -> int | None:
    """Input channels that a model insists on; ``None`` where it takes the data set's.

    Raises:
        ConfigError: There is no such model.
    """
    architecture = _architecture(name, trust_remote_code)
    architecture.check()
    return architecture.channels()


def preprocessing_of(name: str, folder_like: bool, trust_remote_code: bool = False) -> Preprocessing:
    """What a model says of its input.

    Args:
        name: Of the model.
        folder_like: The data are colour images of any size: then a library's model takes what its published weights
            take. Data sets of small images keep their own size and normalisation, as models trained on them do.
        trust_remote_code: Whether code in a ``hf:`` directory may run.
    """
    return _architecture(name, trust_remote_code).preprocessing(folder_like)


def identity_of(name: str, trust_remote_code: bool = False) -> Any:
    """What determines a model's architecture, as plain data without paths; the name itself for a library's."""
    return _architecture(name, trust_remote_code).identity()


def shown(name: str) -> str:
    """A model's name without folders."""
    source, short = source_of(name)
    return f"{source.prefix}{Path(short).name}" if Path(short).is_absolute() else name


def _as_logits(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """The logits in what a classifier returns; a forward hook, so that keys of the state dict stay as they are.

    An object or a mapping has them as ``logits`` (transformers), else as its first tensor; so has a tuple, in which
    auxiliary heads (GoogLeNet and Inception in train mode) come later.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else next(iter(output.values()), None)
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise CheckpointError(
            f"the model returns a {type(output).__name__}, in which no logits are found",
            "Let it return logits, a tuple that begins with them, or an object with an attribute logits.",
        )
    return output


def try_out(model: nn.Module, shape: Sequence[int], classes: int) -> None:
    """See that a model takes images of a shape and gives a logit per class; it is left as it was.

    Raises:
        ConfigError: It does not.
        CheckpointError: It has no final layer that features could be taken from.
    """
    device = next(model.parameters()).device
    size = " x ".join(map(str, shape))
    # Where no layer has an output for each class, the number of outputs says why.
    features = penultimate(model, classes) if has_head(model, classes) else contextlib.nullcontext()
    with frozen(model), torch.no_grad(), features:
        try:
            logits = model(torch.zeros(2, *shape, device=device).contiguous(memory_format=torch.channels_last))
        except (RuntimeError, ValueError, AssertionError, TypeError, SystemExit) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"the model cannot take images of {size}: {reason}",
                "Set data.image_size to the size that it was trained with, or check the channels.",
            ) from None
    check_outputs(logits, classes)
    heads(model, classes)
