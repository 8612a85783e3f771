"""Ways to show images to a model: size, normalisation, order of channels; and what the model makes of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megu_cli.data import Resizing, Split
from megu_cli.data.decode import Decode, Preprocessing
from megu_cli.data.names import hashed
from megu_cli.data.splits import ordered

_BATCH = 60
_SIZES = (8, 16, 24, 28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 299, 384)
# Images are scaled by no more than this, from the present size or their own; but always down to 32 pixels: it is cheap.
_SCALE = 4
_SMALL = 32
# Images whose mean and deviation are taken.
_MEASURED = 120
_USUAL = {
    "pixels from 0 to 1 that are not normalised": ((0.0,), (1.0,)),
    "pixels from 0 to 255 that are not normalised": ((0.0,), (1 / 255,)),
    "mean 0.5 and deviation 0.5": ((0.5,), (0.5,)),
    "ImageNet's normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR's normalisation": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel of the model's input, or of all, and what they are called."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tensors(self, channels: int) -> tuple[Tensor, Tensor]:
        """Both as (C, 1, 1)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1).expand(channels, 1, 1) for values in (self.mean, self.std))
        return mean, std

    @property
    def reverse(self) -> Normalisation:
        """That of the same colours in the other order of channels."""
        return replace(self, mean=self.mean[::-1], std=self.std[::-1])


@dataclass(frozen=True)
class Look:
    """One way to show the images.

    Attributes:
        size: Side in pixels.
        normalisation: What becomes of pixels from 0 to 1.
        bgr: Blue, green, red instead of red, green, blue.
    """

    size: int
    normalisation: Normalisation
    bgr: bool = False

    def turned(self) -> list[Look]:
        """The same with red and blue exchanged: each colour, or each channel of the input, keeps its normalisation."""
        other = replace(self, bgr=not self.bgr)
        return list(dict.fromkeys([replace(other, normalisation=self.normalisation.reverse), other]))

    def renormalised(self, now: Look) -> bool:
        """Whether another normalisation is used, beyond an exchange of red and blue."""
        same = [now.normalisation] if self.bgr == now.bgr else [now.normalisation, now.normalisation.reverse]
        return self.normalisation not in same

    def changes(self, now: Look) -> int:
        """In how many respects it differs from another."""
        return sum((self.size != now.size, self.renormalised(now), self.bgr != now.bgr))


@dataclass(frozen=True)
class Seen:
    """What a model makes of the images.

    Attributes:
        logits: (N, K) of the first N images.
        drift: How far the inputs of its batch normalisations are from those that it was trained with, as the mean
            divergence of normal distributions; 0 without such layers.
    """

    logits: Tensor
    drift: float

    @property
    def says(self) -> Tensor:
        """(N,) the classes that it predicts."""
        return self.logits.argmax(1)

    def first(self, number: int) -> Seen:
        """The same of the first images."""
        return replace(self, logits=self.logits[:number])


class Pictures:
    """A sample of a split that has as many images of each class as there are, decoded in any size.

    The images come in rounds of one of each class: the first N of them are such a sample as well.

    Args:
        split: Training images.
        number: Images at most.
        root: The folder that the images' names are relative to; ``None``: other sizes are made of the decoded images.
        prepared: How the images of ``split`` were made square.
    """

    def __init__(self, split: Split, number: int, root: Path | None, prepared: Preprocessing) -> None:
        index, self.rounds = _in_rounds(split, number)
        chosen = split.at(index)
        self._images = chosen.images
        self.labels, self.names = chosen.labels, list(chosen.names)
        self.channels = len(chosen.mean)
        self._prepared = prepared
        first = self._images[0]
        self._layers, side = first.shape[0], first.shape[-1]
        self._decoded: dict[int, Tensor] = {}
        self._files = [root / name for name in self.names] if root is not None else []
        if not all(file.is_file() for file in self._files):
            self._files = []
        now = Normalisation("", *(tuple(v.flatten().tolist()) for v in (chosen.mean, chosen.std)))
        self.now = Look(side, now, chosen.bgr)

    @property
    def colour(self) -> bool:
        """Whether red and blue can be exchanged."""
        return self._layers == 3

    def pixels(self, size: int, number: int) -> Tensor:
        """(N, C, S, S) uint8, the first images in a size."""
        number, have = min(number, len(self.labels)), self._decoded.get(size)
        if have is None or len(have) < number:
            more = self._made(size, range(0 if have is None else len(have), number))
            have = self._decoded[size] = more if have is None else torch.cat([have, more])
        return have[:number]

    def _made(self, size: int, places: range) -> Tensor:
        if size == self.now.size:
            return torch.cat(list(self._images.batches(list(torch.tensor(list(places)).split(100)))))
        if not self._files:
            return Resizing(size).of_tensor(self.pixels(self.now.size, places.stop)[places.start :])
        usual = self._prepared.image_size == size
        crop, stretch = (self._prepared.crop, self._prepared.stretch) if usual else (1.0, False)
        decode = Decode(Resizing(size, self._prepared.interpolation, crop, stretch), self._layers)
        return torch.stack([decode(self.names[i], self._files[i].read_bytes()) for i in places])

    def batches(self, look: Look, number: int, device: torch.device | str) -> Iterator[Tensor]:
        """The first images as they are looked at."""
        mean, std = (values.to(device) for values in look.normalisation.tensors(self.channels))
        for pixels in self.pixels(look.size, number).split(_BATCH):
            pixels = ordered(pixels.to(device), look.bgr).expand(-1, self.channels, -1, -1)
            yield pixels.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def native(self) -> int | None:
        """The side that most of the images have themselves, where they are square."""
        from PIL import Image

        found: Counter[int] = Counter()
        for file in self._files[:_BATCH]:
            with Image.open(file) as image:
                found[image.size[0] if image.size[0] == image.size[1] else 0] += 1
        side, _ = found.most_common(1)[0] if found else (0, 0)
        return side or None


def _in_rounds(split: Split, number: int) -> tuple[Tensor, Tensor]:
    """Positions, and in which round each is drawn; by hash of the images' identity within a class."""
    rank = np.argsort(np.argsort(hashed(split.names, "preflight"), kind="stable"))
    labels = split.labels.numpy()
    order = np.lexsort((rank, labels))
    starts = np.r_[0, np.flatnonzero(np.diff(labels[order])) + 1]
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    # A class has another place in each round: what is cut off falls on any of them.
    best = np.lexsort((rank[order], turn))[:number]
    return torch.from_numpy(order[best]), torch.from_numpy(turn[best])


def normalisations(
    pictures: Pictures,
    size: int,
    own: tuple[Sequence[float], Sequence[float]] | None,
    advised: Preprocessing | None,
) -> list[Normalisation]:
    """Those worth a try in a size: the present one first, then the model's, the data's and the usual ones."""
    named: list[tuple[str, tuple[Sequence[float], Sequence[float]]]] = []
    # Those below are of red, green, blue.
    colours = advised.ordered(bgr=False) if advised else None
    if colours and colours.mean and colours.std:
        named.append(("the normalisation that the model comes with", (colours.mean, colours.std)))
    if own:
        named.append(("the data set's own normalisation", own))
    values = pictures.pixels(size, _MEASURED).float().div_(255).transpose(0, 1).flatten(1)
    rounded = tuple([float(f"{v:.4g}") for v in side.tolist()] for side in (values.mean(1), values.std(1)))
    if min(rounded[1]) > 0:
        named.append(("the mean and deviation of the images themselves", (rounded[0], rounded[1])))
    named += list(_USUAL.items())
    found = [pictures.now.normalisation]
    for name, (mean, std) in named:
        one = Normalisation(name, tuple(mean), tuple(std))
        one = one.reverse if pictures.now.bgr else one
        if len(one.mean) in (1, pictures.channels) and not any(_same(one, other, pictures.channels) for other in found):
            found.append(one)
    return found


def _same(one: Normalisation, other: Normalisation, channels: int) -> bool:
    pairs = zip(one.tensors(channels), other.tensors(channels), strict=True)
    return all(torch.allclose(mine, theirs, rtol=0.01, atol=0.002) for mine, theirs in pairs)


def sizes(pictures: Pictures, advised: Preprocessing | None) -> list[int]:
    """Sizes worth a try, the cheap ones first; not the present one."""
    side = pictures.now.size
    more = {advised.image_size if advised else None, pictures.native()} - {None, side}
    least = min(min(side, pictures.native() or side) / _SCALE, _SMALL)
    usual = {size for size in _SIZES if least <= size <= side * _SCALE}
    return sorted({*usual, *(size for size in more if size and 4 <= size <= max(_SIZES))} - {side})


def see(
    model: nn.Module,
    pictures: Pictures,
    look: Look,
    number: int,
    device: torch.device | str,
    advance: Callable[[], None] = lambda: None,
) -> Seen | None:
    """What a model makes of the first images; ``None`` where it does not take them, such as a size.

    Args:
        model: In eval mode, on ``device``.
        pictures: The images.
        look: How they are shown.
        number: How many of them, at most.
        device: Where the model is.
        advance: Called after each batch; there are `batches_of` so many.
    """
    logits = []
    try:
        with torch.inference_mode(), _drift(model) as drift:
            for x in pictures.batches(look, number, device):
                logits.append(model(x).float().cpu())
                advance()
    except (RuntimeError, ValueError, AssertionError):
        return None
    return Seen(torch.cat(logits), drift())


def batches_of(number: int) -> int:
    """Batches in which `see` shows so many images."""
    return math.ceil(number / _BATCH)


@contextmanager
def _drift(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Gives a function that tells how far the inputs of batch normalisations are from those of the training."""
    layers = [
        m for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.running_var is not None
    ]  # fmt: skip
    sums: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].detach().double().transpose(0, 1).flatten(1)
        count = torch.full_like(flat[:, 0], flat.shape[1])
        sums[layer].append(torch.stack([count, flat.sum(1), flat.square().sum(1)]))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]

    def told() -> float:
        drifts = []
        for layer, parts in sums.items():
            if parts:
                count, total, squares = torch.stack(parts).sum(0)
                mean = total / count
                var = (squares / count - mean.square()).clamp_min(1e-12)
                m, v = (getattr(layer, name).double() for name in ("running_mean", "running_var"))
                v = v.clamp_min(1e-12)
                drifts.append((((v / var).log() + (var + (mean - m).square()) / v - 1) / 2).median().item())
        return sum(drifts) / len(drifts) if drifts else 0.0

    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()
