"""Models: the built-in networks and those of other libraries or the user's own, their outputs, their final layer."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.errors import CheckpointError, ConfigError, brief

State = dict[str, Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model, as far as it or the user says; ``None`` is left to the data set.

    Attributes:
        mean: Of each channel (or one for all), for pixels from 0 to 1.
        std: Likewise.
        image_size: Side in pixels of the square images.
        interpolation: Of the resizing: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, ``box`` or ``hamming``.
        crop: Share of the resized image's side that the centre cut out of it has.
        stretch: Both sides are resized, rather than the shorter one and the longer one cut.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    interpolation: str = "bilinear"
    crop: float = 1.0
    stretch: bool = False


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers, for images of about 8 pixels a side."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """The basic residual block (He et al., 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A residual network of basic blocks for small images."""

    def __init__(self, classes: int, channels: int, widths: list[int], blocks: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        layers, inner = [], widths[0]
        for level, width in enumerate(widths):
            for position in range(blocks):
                layers.append(_Block(inner, width, 2 if level and not position else 1))
                inner = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


_BUILTIN: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    # For 28 to 32 pixels on a CPU: stride 2 in the stem quarters the work of all that follows.
    "small_resnet": lambda classes, channels: ResNet(classes, channels, [16, 32, 64], blocks=3, stem_stride=2),
    "resnet18": lambda classes, channels: ResNet(classes, channels, [64, 128, 256, 512], blocks=2, stem_stride=1),
}
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
    elif not source and name not in _BUILTIN:
        raise ConfigError(
            f"model.name: there is no model {brief(name)}",
            f"Known: {', '.join(_BUILTIN)}, hf:DIRECTORY, torchvision:NAME, timm:NAME, python:MODULE:FACTORY.",
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
        from megu_cli.huggingface import fresh

        model = fresh(short, classes, trust_remote_code)
    elif source == PYTHON:
        model = _made(short, classes, channels)
    else:
        model = _BUILTIN[name](classes, channels)
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
        from megu_cli.huggingface import channels

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
        from megu_cli.huggingface import preprocessing

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
        from megu_cli.huggingface import identity

        return [HF, identity(short, trust_remote_code)]
    if source == PYTHON:
        from megu_cli.artifacts import file_digest

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


def unreached(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the parameters that the logits do not depend on, such as those of auxiliary heads.

    No loss on the logits changes them. Told by the gradients of one pass in eval mode.
    """
    with frozen(model), torch.enable_grad():
        model.requires_grad_(True)
        gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
        return [name for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g is None]


def names_of_tensors(model: nn.Module) -> list[list[str]]:
    """The names of each tensor of a model's state dict: more than one where it is tied."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def load_state(model: nn.Module, state: State, source: str) -> nn.Module:
    """Load weights strictly. Of tied weights one is enough.

    Raises:
        CheckpointError: Keys or shapes differ (the differences are listed), or a weight is not finite.
    """
    own = model.state_dict()
    tied = [group for group in names_of_tensors(model) if len(group) > 1]
    alias = {name: next((n for n in group if n in state), name) for group in tied for name in group}
    missing = [f"missing: {key}" for key in own if alias.get(key, key) not in state]
    unexpected = [f"unexpected: {key}" for key in state if key not in own]
    faults = [*missing[:5], *unexpected[:5], *missing[5:], *unexpected[5:]]  # some of both are shown
    faults += [
        f"shape of {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if not faults:
        faults = [
            f"values: {name} and {first} differ, and are one tensor in the model"
            for name, first in alias.items()
            if name in state and not torch.equal(state[name], state[first])
        ]
    if faults:
        hint = "model.name is another architecture, or the channels differ."
        if all(fault.startswith("shape") for fault in faults) and len(faults) <= 2:
            hint = "The number of classes differs: check data.name, data.superclasses and model.name."
        told = "\n".join(f"  {fault}" for fault in faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(f"{source} does not fit the model ({len(faults)} differences)\n{told}{more}", hint)
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinite weights in {', '.join(broken[:4])}",
            "The training that made it diverged.",
        )
    model.load_state_dict({key: state[alias.get(key, key)] for key in own}, strict=True)
    return model


def like(state: State, original: State) -> State:
    """``state`` in the dtypes of ``original``, key by key, so that the result is a drop-in."""
    return {key: state[key].detach().cpu().to(value.dtype) for key, value in original.items()}


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
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients for a block; all is restored after it."""
    needed = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with evaluating(model.requires_grad_(False)):
            yield
    finally:
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
