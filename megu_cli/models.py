"""Models: the built-in networks, torchvision's, and strict loading of checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.errors import CheckpointError, ConfigError

State = dict[str, Tensor]


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


_TORCHVISION = "torchvision:"


def channels_of(name: str) -> int | None:
    """Input channels that a model insists on; ``None`` where it takes the data set's."""
    return None if name in _BUILTIN else 3


def check_name(name: str) -> None:
    """See that there is such a model.

    Raises:
        ConfigError: There is none; those that there are are named.
    """
    short = name.removeprefix(_TORCHVISION)
    if name.startswith(_TORCHVISION):
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if short not in known:
            raise ConfigError(f"model.name: torchvision has no classifier {short!r}", f"It has: {', '.join(known)}.")
    elif name not in _BUILTIN:
        raise ConfigError(
            f"model.name: there is no model {name!r}", f"Known: {', '.join(_BUILTIN)}, {_TORCHVISION}NAME."
        )


def build(name: str, classes: int, channels: int) -> nn.Module:
    """A freshly initialised model, from torch's global random state.

    Args:
        name: ``small_cnn``, ``small_resnet``, ``resnet18`` or ``torchvision:NAME``.
        classes: Number of classes K.
        channels: Channels of the images.

    Raises:
        ConfigError: There is no such model.
    """
    check_name(name)
    if name in _BUILTIN:
        model = _BUILTIN[name](classes, channels)
    else:
        import torchvision

        model = torchvision.models.get_model(name.removeprefix(_TORCHVISION), weights=None, num_classes=classes)
    return model.to(memory_format=torch.channels_last)


def read_checkpoint(path: Path) -> State:
    """The state dict in a checkpoint file; no pickled code is ever run.

    Raises:
        CheckpointError: The file is missing, damaged, needs code to be run, or is no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", "Set model.checkpoint, or make one with `megu train`.")
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return dict(safetensors.torch.load_file(path))
        except Exception as error:  # safetensors raises its own SafetensorError, which it does not export everywhere
            raise CheckpointError(f"{path} is damaged, truncated or no safetensors file: {error}") from None
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors (a pickle that would run code, or a damaged file); it was not loaded",
            "Where it was made, save the weights alone: torch.save(model.state_dict(), 'weights.pth').",
        ) from None
    except Exception as error:  # torch.load raises RuntimeError, EOFError, OSError and more for damaged files
        raise CheckpointError(f"{path} is damaged or truncated: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} is no plain state dict (name -> tensor)",
            "Save model.state_dict() alone, and name that file.",
        )
    return state


def load_state(model: nn.Module, state: State, source: str) -> nn.Module:
    """Load weights strictly.

    Raises:
        CheckpointError: Keys or shapes differ (the differences are listed), or a weight is not finite.
    """
    own = model.state_dict()
    faults = [f"missing: {key}" for key in own if key not in state]
    faults += [f"unexpected: {key}" for key in state if key not in own]
    faults += [
        f"shape of {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if faults:
        hint = "model.name is another architecture, or the channels differ."
        if all(fault.startswith("shape") for fault in faults) and len(faults) <= 2:
            hint = "The number of classes differs: check data.name, data.superclasses and model.name."
        shown = "\n".join(f"  {fault}" for fault in faults[:8])
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{source} does not fit the model ({len(faults)} differences)\n{shown}{more}", hint)
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinite weights in {', '.join(broken[:4])}",
            "The training that made it diverged.",
        )
    model.load_state_dict(state, strict=True)
    return model


def like(state: State, original: State) -> State:
    """``state`` in the dtypes of ``original``, key by key, so that the result is a drop-in."""
    return {key: state[key].detach().cpu().to(value.dtype) for key, value in original.items()}


def classifier(model: nn.Module, classes: int) -> nn.Module:
    """The last linear (or 1x1 convolution) layer with one output per class.

    Raises:
        CheckpointError: The model has no such layer.
    """
    for module in reversed(list(model.modules())):
        outputs = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if outputs == classes and isinstance(module, (nn.Linear, nn.Conv2d)):
            return module
    raise CheckpointError(f"the model has no final layer with {classes} outputs")


@contextlib.contextmanager
def penultimate(model: nn.Module, classes: int) -> Iterator[list[Tensor]]:
    """Collect the classifier's inputs, flattened to (B, D), of each forward pass in the block."""
    collected: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        collected.append((x.mean((2, 3)) if x.ndim == 4 else x).flatten(1).detach())

    handle = classifier(model, classes).register_forward_pre_hook(keep)
    try:
        yield collected
    finally:
        handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients for a block; all is restored after it."""
    was_training = model.training
    needed = [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
