"""Preflight: does a checkpoint classify the data as it should, and if not, why? Told by trying, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from megu_cli.data import MemoryImages, Resizing, Split, sampled
from megu_cli.errors import CheckpointError
from megu_cli.models.features import frozen

_IMAGES = 500
_TRIED = 200
# A model that classifies this share of its training images is not looked into.
_FINE = 0.9
# What undoing a mistake must gain to count as the cause.
_GAIN = 0.1
_SIZES = (8, 16, 28, 32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 384)
_USUAL = {
    "pixels from 0 to 1 that are not normalised": ((0.0,), (1.0,)),
    "pixels from 0 to 255 that are not normalised": ((0.0,), (1 / 255,)),
    "mean 0.5 and deviation 0.5": ((0.5,), (0.5,)),
    "ImageNet's normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class _Cause:
    """What would explain a bad accuracy: what it would be otherwise, and what to do."""

    accuracy: float
    told: str
    hint: str


def check(
    model: nn.Module,
    split: Split,
    classes: Sequence[str],
    *,
    expected: float | None = None,
    own: tuple[Sequence[float], Sequence[float]] | None = None,
    number: int | None = None,
    device: torch.device | str = "cpu",
) -> str:
    """See that a model classifies a sample of its training images.

    It fails where accuracy is at chance, or under the expected one by more than the sample explains, or where one of
    the usual mistakes, undone, would make it better by a tenth: another order of classes, normalisation, order of
    channels or size.

    Args:
        model: In eval mode, on ``device``.
        split: Training images; 500 of them are taken by hash of their identity.
        classes: (K,) names.
        expected: Accuracy that the user expects, from 0 to 1.
        own: Mean and deviation that the data set would be normalised with by itself.
        number: So many images of ``split``, the first ones, are training images; ``None``: all.
        device: Where the model is.

    Returns:
        What was found, in a line.

    Raises:
        CheckpointError: It fails; the likeliest cause is named.
    """
    known = range(len(split) if number is None else number)
    sample = _sample(split, known, _IMAGES)
    with frozen(model):
        right = _says(model, sample, device) == sample.labels
        accuracy = right.double().mean().item()
        counts = torch.bincount(sample.labels)
        chance = max(1 / len(classes), counts.max().item() / len(sample))
        line = f"{100 * accuracy:.1f}% of {len(sample)} training images classified right (chance {100 * chance:.1f}%"
        line += ")" if expected is None else f", expected {100 * expected:.1f}%)"
        at_chance = accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / len(sample))
        if expected is None:
            low, fine = at_chance, accuracy >= _FINE
        else:
            low = accuracy < expected - 0.02 - 3 * math.sqrt(expected * (1 - expected) / len(sample))
            fine = not low
        if fine:
            return line
        causes = [
            *_other_order(model, split, known, classes, accuracy, device),
            *_other_input(model, sample, own, device),
        ]
    if causes:
        cause = max(causes, key=lambda found: found.accuracy)
        raise CheckpointError(
            f"preflight: {line}; {cause.told} it would be {100 * cause.accuracy:.0f}%",
            f"{cause.hint}\nmodel.preflight: false goes on all the same.",
        )
    if low:
        raise CheckpointError(
            f"preflight: {line}; no other order of classes, normalisation, order of channels or size is better",
            "These may not be the data that it was trained with, or not the weights.\n"
            "model.preflight: false goes on all the same.",
        )
    return line


def _sample(split: Split, known: Sequence[int], number: int) -> Split:
    """Up to ``number`` of the images at ``known`` by hash, decoded."""
    index = torch.tensor(sorted(sampled(split, known, number)))
    chosen = split.at(index)
    pixels = torch.cat(list(chosen.images.batches(list(torch.arange(len(index)).split(100)))))
    return replace(chosen, images=MemoryImages(pixels))


def _first(split: Split, number: int) -> Split:
    return split.at(torch.arange(min(number, len(split))))


def _says(model: nn.Module, split: Split, device: torch.device | str) -> Tensor:
    """(N,) the classes that a model predicts."""
    with torch.inference_mode():
        found = [model(x).argmax(1).cpu() for _, x in split.pass_over(torch.arange(len(split)), 100, device)]
    return torch.cat(found)


def _better(now: float, then: float, images: int) -> bool:
    """Whether a difference is large, and more than the sample explains."""
    return then - now >= max(_GAIN, 2 * math.sqrt(0.5 / images))


def _other_order(
    model: nn.Module,
    split: Split,
    known: Sequence[int],
    classes: Sequence[str],
    accuracy: float,
    device: torch.device | str,
) -> list[_Cause]:
    """The classes in another order: the best one-to-one match of outputs and labels, judged on other images.

    One half of the images gives the match and the other half its accuracy, both ways; a match that is judged on what
    made it is better than chance for nothing.
    """
    sample = _sample(split, known, min(max(_IMAGES, 4 * len(classes)), 2000))
    says, labels = _says(model, sample, device).numpy(), sample.labels.numpy()
    halves = np.arange(len(labels)) % 2 == 0
    hits = 0
    for half in (halves, ~halves):
        match = _match(says[half], labels[half])
        hits += sum(match.get(int(output)) == label for output, label in zip(says[~half], labels[~half], strict=True))
    then = hits / len(labels)
    if not _better(accuracy, then, len(labels)):
        return []
    match = _match(says, labels)
    moved = [(output, label) for output, label in sorted(match.items()) if output != label]
    told = ", ".join(f"{classes[output]!r} for images of {classes[label]!r}" for output, label in moved[:3])
    more = f" and so on, {len(moved)} classes in all" if len(moved) > 3 else ""
    order = [classes[match[output]] for output in range(len(classes))] if len(match) == len(classes) <= 20 else None
    return [
        _Cause(
            then,
            f"the order of the classes differs: the model says {told}{more}. In the other order",
            "Give model.classes the names in the order of the model's outputs"
            + (f"; by what it says that is: [{', '.join(map(repr, order))}]." if order else "."),
        )
    ]


def _match(says: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Output -> label, one to one, such that the most images are right; only for what occurs, at most 1,000 of each."""
    outputs, rows = np.unique(says, return_inverse=True)
    truths, columns = np.unique(labels, return_inverse=True)
    table = np.zeros((len(outputs), len(truths)))
    np.add.at(table, (rows, columns), 1)
    # The assignment takes cubic time: the most frequent alone are matched.
    often, common = (np.argsort(-table.sum(axis), kind="stable")[:1000] for axis in (1, 0))
    outputs, truths, table = outputs[often], truths[common], table[np.ix_(often, common)]
    first, second = linear_sum_assignment(-table)
    return {int(outputs[i]): int(truths[j]) for i, j in zip(first, second, strict=True) if table[i, j]}


def _other_input(
    model: nn.Module,
    sample: Split,
    own: tuple[Sequence[float], Sequence[float]] | None,
    device: torch.device | str,
) -> list[_Cause]:
    """Another normalisation, order of channels or size of the same images."""
    few = _first(sample, _TRIED)
    now = (_says(model, few, device) == few.labels).double().mean().item()
    channels = len(few.mean)
    tried: list[tuple[Split, str, str]] = []

    normalisations = {**({"the data set's own normalisation": own} if own else {}), **_USUAL}
    for name, (mean, std) in normalisations.items():
        if len(mean) in (1, channels):
            means, stds = (torch.tensor(v).view(-1, 1, 1).expand(channels, 1, 1) for v in (mean, std))
            if not (torch.allclose(means, few.mean) and torch.allclose(stds, few.std)):
                lists = [f"[{', '.join(f'{v:.4g}' for v in values)}]" for values in (mean, std)]
                hint = f"Set model.mean: {lists[0]} and model.std: {lists[1]}."
                tried.append((replace(few, mean=means, std=stds), f"with {name}", hint))
    pixels = few.images.pixels if isinstance(few.images, MemoryImages) else torch.empty(0)
    if pixels.shape[1] == 3:
        hint = "The model takes blue, green, red: name a python: factory whose module turns them round (x.flip(1))."
        tried.append((replace(few, images=MemoryImages(pixels.flip(1))), "with red and blue exchanged", hint))
    side = pixels.shape[-1]
    for size in _SIZES:
        if size != side and side / 8 <= size <= side * 8:
            # A pass costs as the square of the side: fewer images where they are larger.
            part = _first(few, max(50, round(_TRIED * min(1.0, (max(side, 64) / size) ** 2))))
            scaled = MemoryImages(Resizing(size).of_tensor(pixels[: len(part)]))
            hint = f"Set data.image_size: {size}."
            tried.append((replace(part, images=scaled), f"with images of {size} x {size} pixels", hint))

    causes = []
    for other, told, hint in tried:
        try:
            hits = _says(model, other, device) == other.labels
        except (RuntimeError, ValueError, AssertionError):  # a size that the model does not take
            continue
        then = hits.double().mean().item()
        if _better(now, then, len(other)):
            causes.append(_Cause(then, told, hint))
    return causes
