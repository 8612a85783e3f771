"""The built-in networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from megu_cli.config.model_sources import MODEL_SOURCES
from megu_cli.errors import ConfigError, brief
from megu_cli.models.architecture import Architecture


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


BUILTIN: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    # For 28 to 32 pixels on a CPU: stride 2 in the stem quarters the work of all that follows.
    "small_resnet": lambda classes, channels: ResNet(classes, channels, [16, 32, 64], blocks=3, stem_stride=2),
    "resnet18": lambda classes, channels: ResNet(classes, channels, [64, 128, 256, 512], blocks=2, stem_stride=1),
}


class OwnNetwork(Architecture):
    """A network of this module."""

    def check(self) -> None:
        """See `Architecture.check`."""
        if self.name not in BUILTIN:
            known = [*BUILTIN, *(source.form for source in MODEL_SOURCES.values())]
            raise ConfigError(f"model.name: there is no model {brief(self.name)}", f"Known: {', '.join(known)}.")

    def build(self, classes: int, channels: int) -> nn.Module:
        """See `Architecture.build`."""
        return BUILTIN[self.name](classes, channels)
