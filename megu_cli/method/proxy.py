"""Beyond the paper: a proxy for the retrained model.

A perturbing label should be the answer of a model that was trained without the forget set. The proxy is such a model:
a small convolutional network, trained on thumbnails of retained images alone. On whole classes it agrees with a
retrained model as often as a second retrained model does. docs/decisions.md has the figures.

The original model and the proxy are compared on held-out images, which neither has seen. What connects their answers
there (`temperature`, `Mapping`) is then applied to the proxy's answers on the forget set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.config import ProxyConfig
from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.execution.runtime import seeded
from megu_cli.training import Duration, fit, shuffled

# Sides of a thumbnail in pixels; samples that a network is trained on, in how many passes at least and at most.
_SMALLEST, _LARGEST, _SAMPLES, _FEWEST_PASSES, _MOST_PASSES = 8, 32, 60_000, 10, 40
# Two poolings need so many pixels a side; a smaller image is enlarged.
_LEAST = 4
_BATCH, _LR, _MOMENTUM, _WEIGHT_DECAY = 128, 0.3, 0.9, 5e-4
# Scales of a `Mapping`, from 0.2 to 20 in steps of 5%.
_SCALES = [0.2 * 1.05**step for step in range(95)]


class ThumbnailNet(nn.Module):
    """Three 3x3 convolutions with batch norm and a linear head on the mean of their outputs.

    Args:
        classes: Number of classes K.
        channels: Channels of an image.
        width: Channels after the first convolution; the next two have twice and four times as many.
    """

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(((channels, width), (width, 2 * width), (2 * width, 4 * width))):
            layers += [nn.MaxPool2d(2)] if i else []
            layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of thumbnails (B, C, h, w)."""
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def answers(
    split: Split,
    retain: Tensor,
    asked: Split,
    classes: int,
    settings: ProxyConfig,
    execution: Execution = LOCAL,
) -> Tensor:
    """Train the proxy on retained images and return its answers on other images.

    Args:
        split: The training images.
        retain: (N_r,) positions of D_r; at most ``settings.images`` of them, drawn by the seed, are read.
        asked: The N images to answer for. None of them is trained on.
        classes: Number of classes K.
        settings: ``labels.proxy``.
        execution: Device, images per forward pass, progress, and the seed of the draw of images, the initialisation
            and the order. The work is neither shared between processes nor resumed.

    Returns:
        (N, K) float64 log-probabilities, the mean over the networks.
    """
    execution = execution.unshared
    batch, device = execution.eval_batch, execution.device
    known = torch.cat(shuffled(retain, min(len(retain), settings.images), batch, execution.seed, "proxy"))
    first = next(split.batches([known[:1]]))
    side = _side(min(first.shape[2:]))
    shown = torch.cat(list(_thumbnails(split, known, side, batch, device)))
    labels = split.labels[known].to(device)
    networks = [_trained(shown, labels, classes, settings, number, execution) for number in range(settings.networks)]
    rows = []
    with torch.inference_mode(), execution.track("proxy: answers", math.ceil(len(asked) / batch)) as advance:
        for x in _thumbnails(asked, torch.arange(len(asked)), side, batch, device):
            said = [network(x).double().log_softmax(1) for network in networks]
            rows.append(torch.stack(said).mean(0).cpu())
            advance()
    return torch.cat(rows) if rows else torch.empty(0, classes, dtype=torch.float64)


def passes(settings: ProxyConfig, images: int) -> int:
    """Passes over a number of images."""
    if settings.passes != "auto":
        return settings.passes
    return min(_MOST_PASSES, max(_FEWEST_PASSES, _SAMPLES // images))


def steps(settings: ProxyConfig, images: int) -> int:
    """Optimiser steps of all networks, on a number of images."""
    return settings.networks * passes(settings, images) * math.ceil(images / _batch(images))


def _batch(images: int) -> int:
    """Samples per step: few images in large batches would be few steps."""
    return min(_BATCH, max(8, images // 8))


def _side(pixels: int) -> int:
    """Side of the thumbnails of images with ``pixels`` a side: half of it, from 8 to 32."""
    return max(_LEAST, min(pixels, max(_SMALLEST, min(_LARGEST, pixels // 2))))


def _thumbnails(split: Split, index: Tensor, side: int, batch: int, device: torch.device | str) -> Iterator[Tensor]:
    for x in split.batches(list(index.split(batch)), device):
        yield functional.adaptive_avg_pool2d(x, side).contiguous(memory_format=torch.channels_last)


def _trained(
    images: Tensor,
    labels: Tensor,
    classes: int,
    settings: ProxyConfig,
    number: int,
    execution: Execution,
) -> nn.Module:
    """Train one network by one-cycle SGD."""
    epochs, size, seed = passes(settings, len(images)), _batch(len(images)), execution.seed
    with seeded(seed, "proxy", number, "init"):
        model: nn.Module = ThumbnailNet(classes, images.shape[1], settings.width)
    model.to(device=images.device).to(memory_format=torch.channels_last)
    places = torch.arange(len(images))
    per_pass = math.ceil(len(images) / size)
    optimizer = torch.optim.SGD(model.parameters(), _LR, _MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True)
    fit(
        model,
        Duration(epochs, per_pass),
        batches=lambda epoch, first: shuffled(places, len(places), size, seed, "proxy", number, epoch)[first:],
        loss=lambda net, index: functional.cross_entropy(net(images[index]), labels[index.to(labels.device)]),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=epochs * per_pass),
        label=f"proxy {number + 1}",
        execution=execution,
    )
    return model


@dataclass(frozen=True)
class Mapping:
    """A map from the proxy's answer and the true label to the original model's answer on unseen images.

    softmax(scale * (log q + bonus * onehot(y))). The original is right more often than the proxy, so the true label
    says something about its answer.

    Attributes:
        scale: Factor of the log-probabilities; above 1 the answer is surer than the proxy's.
        bonus: What is added to the true label's log-probability, in nats.
    """

    scale: float = 1.0
    bonus: float = 0.0

    def __call__(self, proxy: Tensor, true: Tensor) -> Tensor:
        """(N, K) distributions of (N, K) log-probabilities and (N,) true labels."""
        label = functional.one_hot(true, proxy.shape[1])
        return (self.scale * (proxy + self.bonus * label)).softmax(1)


def mapping(proxy: Tensor, original: Tensor, true: Tensor) -> Mapping:
    """Fit a `Mapping` on held-out images.

    The bonus makes the mapped answer right as often as the original's, and the scale then brings it as near to the
    original's as can be, by the mean JS divergence. A fit of both by cross-entropy would be right too often: the most
    likely label of a distribution is right more often than a model that is surer than its accuracy.

    Args:
        proxy: (V, K) log-probabilities of the proxy, V > 0.
        original: (V, K) logits of the original model.
        true: (V,) true labels.
    """
    proxy, answer = proxy.double(), original.double().softmax(1)
    others = proxy.scatter(1, true[:, None], float("-inf")).amax(1)
    # The bonus from which on each image is right.
    needed = (others - proxy.gather(1, true[:, None])[:, 0]).sort().values
    right = int((original.argmax(1) == true).sum())
    bonus = float((needed[max(right - 1, 0)] + needed[min(right, len(needed) - 1)]) / 2)
    scale = min(_SCALES, key=lambda scale: _divergence(Mapping(scale, bonus)(proxy, true), answer))
    return Mapping(scale, bonus)


def temperature(proxy: Tensor, original: Tensor) -> float:
    """Return the temperature at which the proxy is as sure as the original model on the same unseen images.

    Bisection on the mean entropy of softmax(log q / t), which grows with t.

    Args:
        proxy: (V, K) log-probabilities of the proxy; -inf where no answer may go.
        original: (V, K) logits of the original model; -inf likewise.

    Returns:
        From 0.05 to 5; 1 without images.
    """
    if not len(proxy):
        return 1.0
    sure = _entropy(original.double().softmax(1))
    low, high = 0.05, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy((proxy / middle).softmax(1)) < sure else (low, middle)
    return (low + high) / 2


def _entropy(p: Tensor) -> float:
    """Mean entropy in nats of (V, K) distributions."""
    return float(-torch.xlogy(p, p).sum(1).mean())


def _divergence(p: Tensor, q: Tensor) -> float:
    """Mean Jensen-Shannon divergence in nats of (V, K) distributions."""
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
