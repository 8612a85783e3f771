"""Where a model comes from, by its name: a built-in network, torchvision, timm, transformers, or code of the user."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megu_cli.data.decode import Preprocessing
from megu_cli.errors import CheckpointError, ConfigError, brief
from megu_cli.models.features import frozen, penultimate
from megu_cli.models.networks import BUILTIN

TORCHVISION, TIMM, PYTHON, HF = "torchvision:", "timm:", "python:", "hf:"


def check_name(name: str) -> None:
    """See that there is such a model, as far as that can be told without making it.

    Raises:
        ConfigError: There is none; those that there are are named.
    """
    source, short = source_of(name)
    if source == TORCHVISION:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if short not in known:
            raise ConfigError(
                f"model.name: torchvision has no classifier {brief(short)}", f"It has: {', '.join(known)}."
            )
    elif source == TIMM:
        timm = _timm()
        if not timm.is_model(short):
            near = difflib.get_close_matches(short, timm.list_models(), n=3)
            raise ConfigError(
                f"model.name: timm has no model {brief(short)}", f"Near it: {', '.join(near)}." if near else ""
            )
    elif source == PYTHON:
        factory_of(short)
    elif not source and name not in BUILTIN:
        raise ConfigError(
            f"model.name: there is no model {brief(name)}",
            f"Known: {', '.join(BUILTIN)}, hf:DIRECTORY, torchvision:NAME, timm:NAME, python:MODULE:FACTORY.",
        )


def source_of(name: str) -> tuple[str, str]:
    """The prefix of a model's name, empty for a built-in one, and the rest."""
    source = next((s for s in (TORCHVISION, TIMM, PYTHON, HF) if name.startswith(s)), "")
    return source, name.removeprefix(source)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError("model.name: timm is not installed", "pip install 'megu-cli[timm]'") from None
    return timm


def factory_of(name: str) -> Callable[..., nn.Module]:
    """The function that ``FOLDER/MODULE:FUNCTION`` names; its module is looked for in the folder, then as installed.

    This runs the user's own code, because they named it.

    Raises:
        ConfigError: There is no such module or function, or importing it fails.
    """
    place, colon, function = name.rpartition(":")
    folder, module = Path(place).parent, Path(place).name.removesuffix(".py")
    if not (colon and module and function):
        raise ConfigError(f"model.name: python:{name} is not of the form python:MODULE:FACTORY")
    here = folder.joinpath(*module.split("."))
    file = next((f for f in (here.with_name(f"{here.name}.py"), here / "__init__.py") if f.is_file()), None)
    known = sys.modules.get(module)
    if file and known and Path(str(known.__file__)).resolve() != file.resolve():
        del sys.modules[module]  # of another folder, by the same name
    if file:
        # As Python does for the folder of a script; it comes first, so that the folder decides.
        sys.path[:] = [str(folder), *(path for path in sys.path if path != str(folder))]
        importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result
            found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises; its exit is no success of megu's
        raise ConfigError(
            f"model.name: the module {module} cannot be imported: {type(error).__name__}: {error}",
            f"It is looked for in {folder} first, then among the installed ones.",
        ) from None
    if not callable(found):
        raise ConfigError(f"model.name: the module {module} has no function {brief(function)}")
    return found  # type: ignore[no-any-return]


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
    check_name(name)
    source, short = source_of(name)
    if source == TORCHVISION:
        import torchvision

        model = torchvision.models.get_model(short, weights=None, num_classes=classes)
    elif source == TIMM:
        model = _timm().create_model(short, pretrained=False, num_classes=classes, in_chans=channels)
    elif source == HF:
        from megu_cli.models.huggingface import fresh

        model = fresh(short, classes, trust_remote_code)
    elif source == PYTHON:
        model = _made(short, classes, channels)
    else:
        model = BUILTIN[name](classes, channels)
    model.register_forward_hook(_as_logits)
    return model.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def channels_of(name: str, trust_remote_code: bool = False) -> int | None:
    """Input channels that a model insists on; ``None`` where it takes the data set's.

    Raises:
        ConfigError: There is no such model.
    """
    check_name(name)
    source, short = source_of(name)
    if source == HF:
        from megu_cli.models.huggingface import channels

        return channels(short, trust_remote_code)
    if source == PYTHON and "channels" not in _parameters(factory_of(short)):
        layers = _made(short, 2, 3).modules()
        return next((m.in_channels for m in layers if isinstance(m, nn.Conv2d)), None)
    return 3 if source == TORCHVISION else None


def preprocessing_of(name: str, folder_like: bool, trust_remote_code: bool = False) -> Preprocessing:
    """What a model says of its input.

    Args:
        name: Of the model.
        folder_like: The data are colour images of any size: then a library's model takes what its published weights
            take. Data sets of small images keep their own size and normalisation, as models trained on them do.
        trust_remote_code: Whether code in a ``hf:`` directory may run.
    """
    source, short = source_of(name)
    if source == HF:
        from megu_cli.models.huggingface import preprocessing

        return preprocessing(short, trust_remote_code)
    if source == TORCHVISION and folder_like:
        import torchvision

        weights = getattr(torchvision.models.get_model_weights(short), "DEFAULT", None)
        own = weights.transforms() if weights else None
        if own is not None and hasattr(own, "crop_size"):
            side, shorter = own.crop_size[0], own.resize_size[0]
            return Preprocessing(
                tuple(own.mean), tuple(own.std), side, own.interpolation.value, crop=min(1.0, side / shorter)
            )
    if source == TIMM and folder_like:
        from timm.data.config import resolve_data_config

        known = _timm().get_pretrained_cfg(short)
        if known is None:
            return Preprocessing()
        own = resolve_data_config({}, pretrained_cfg=known.to_dict())
        return Preprocessing(
            tuple(own["mean"]), tuple(own["std"]), own["input_size"][1], own["interpolation"], crop=own["crop_pct"]
        )
    return Preprocessing()


def identity_of(name: str, trust_remote_code: bool = False) -> Any:
    """What determines a model's architecture, as plain data without paths; the name itself for a library's."""
    source, short = source_of(name)
    if source == HF:
        from megu_cli.models.huggingface import identity

        return [HF, identity(short, trust_remote_code)]
    if source == PYTHON:
        from megu_cli.run.artifacts import file_digest

        factory_of(short)
        file = sys.modules[Path(short.rpartition(":")[0]).name.removesuffix(".py")].__file__
        return [PYTHON, Path(short).name, file_digest(Path(file)) if file else None]
    return name


def shown(name: str) -> str:
    """A model's name without folders."""
    source, short = source_of(name)
    return f"{source}{Path(short).name}" if source in (HF, PYTHON) and Path(short).is_absolute() else name


def _parameters(factory: Callable[..., nn.Module]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except ValueError:  # a builtin has no signature
        return {}


def _made(name: str, classes: int, channels: int) -> nn.Module:
    """What the user's factory gives, told of the number of classes and channels where it takes them."""
    factory = factory_of(name)
    parameters = _parameters(factory)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {"classes": classes, "channels": channels}
    given = {key: value for key, value in given.items() if open_ended or key in parameters}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model = factory(**given)
    except (Exception, SystemExit) as error:  # whatever the user's factory raises
        told = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ConfigError(
            f"model.name: python:{Path(name).name}({told}) failed: {type(error).__name__}: {error}",
            "It is called with classes and channels where it takes arguments of these names, else without.",
        ) from None
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name: python:{Path(name).name} gave a {type(model).__name__}, no torch.nn.Module")
    return copy.deepcopy(model)  # a factory may give the same model each time


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
    with frozen(model), torch.no_grad(), penultimate(model, classes):
        try:
            logits = model(torch.zeros(2, *shape, device=device).contiguous(memory_format=torch.channels_last))
        except (RuntimeError, ValueError, AssertionError, TypeError, SystemExit) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"the model cannot take images of {size}: {reason}",
                "Set data.image_size to the size that it was trained with, or check the channels.",
            ) from None
    if logits.shape != (2, classes):
        raise ConfigError(
            f"the model gives {tuple(logits.shape[1:])} outputs for an image of {size}, not one for each of the "
            f"{classes} classes",
            "Check data.name, data.superclasses and model.name.",
        )
