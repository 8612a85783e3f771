"""Preflight: does a checkpoint classify the data as it should, and if not, why? Found by trying, before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.data.decode import Preprocessing
from megu_cli.errors import CheckpointError
from megu_cli.execution.runtime import Track, silent
from megu_cli.models.features import check_outputs, frozen
from megu_cli.models.looks import Look, Pictures, Seen, batches_of, normalisations, see, sizes

_IMAGES = 500
# A model that classifies this share of its training images is not looked into.
_FINE = 0.9
# What undoing a mistake must gain to count as the cause.
_GAIN = 0.1
# An accuracy from which on nothing dearer is tried.
_EXPLAINED = 0.97
# Images of a first try, of one at a size that takes longer, and of the second try of so many that did best.
_SCREEN, _DEAR, _CONFIRM, _FINALISTS = 120, 60, 180, 6
# Pixels a side that do not take long.
_CHEAP = 64
# Accuracies that lie closer together than this are equal: the smaller change is the likelier cause.
_EQUAL = 0.015


@dataclass(frozen=True)
class Finding:
    """What a preflight found.

    Attributes:
        line: How many images are classified right.
        low: The accuracy is at chance, or well below the expected one.
        cause: What would explain it, in words; empty if nothing does.
        hint: What to do about it.
        settings: Dotted key of the config -> the value that helps.
    """

    line: str
    low: bool
    cause: str = ""
    hint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fault(self) -> CheckpointError | None:
        """The error that it stands for; ``None`` if all is right."""
        anyway = "Set model.preflight: false to continue anyway."
        if self.cause:
            return CheckpointError(f"preflight: {self.line}; {self.cause}", f"{self.hint}\n{anyway}")
        if self.low:
            return CheckpointError(
                f"preflight: {self.line}; no other order of classes, normalisation, order of channels or size is "
                "better",
                f"These may not be the data that it was trained with, or not the weights.\n{anyway}",
            )
        return None


def check(model: nn.Module, split: Split, classes: Sequence[str], **given: Any) -> str:
    """See that a model classifies a sample of its training images; the arguments are those of `examine`.

    Returns:
        What was found, in a line.

    Raises:
        CheckpointError: Accuracy is at chance, or under the expected one by more than the sample explains, or one of
            the usual mistakes, undone, would make it better by a tenth; the likeliest cause is named.
    """
    found = examine(model, split, classes, **given)
    if fault := found.fault:
        raise fault
    return found.line


def examine(
    model: nn.Module,
    split: Split,
    classes: Sequence[str],
    *,
    expected: float | None = None,
    own: tuple[Sequence[float], Sequence[float]] | None = None,
    root: Path | None = None,
    prepared: Preprocessing | None = None,
    advised: Preprocessing | None = None,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> Finding:
    """Classify training images, and where that fails, find out which other input or order of classes helps.

    Args:
        model: In eval mode, on ``device``.
        split: Training images; a sample of them is taken that has as many of each class as there are.
        classes: (K,) names.
        expected: Accuracy that the user expects, from 0 to 1.
        own: Mean and deviation that the data set would be normalised with by itself.
        root: The folder that the names of the images are relative to; other sizes are decoded from the files there.
        prepared: How the images are prepared now.
        advised: How the model itself says that they are to be prepared.
        device: Where the model is.
        track: Reports progress.
    """
    pictures = Pictures(split, min(max(_IMAGES, 4 * len(classes)), 2000), root, prepared or Preprocessing())
    with frozen(model):
        with track("preflight", batches_of(len(pictures.labels))) as advance:
            now = see(model, pictures, pictures.now, len(pictures.labels), device, advance)
        if now:
            check_outputs(now.logits, len(classes))
        labels = pictures.labels[:_IMAGES]
        right = now.first(_IMAGES).says == labels if now else torch.zeros(len(labels), dtype=torch.bool)
        accuracy = right.double().mean().item()
        chance = max(1 / len(classes), torch.bincount(labels).max().item() / len(labels))
        line = f"{100 * accuracy:.1f}% of {len(labels)} training images classified right (chance {100 * chance:.1f}%"
        line += ")" if expected is None else f", expected {100 * expected:.1f}%)"
        if expected is None:
            low = accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / len(labels))
            fine = accuracy >= _FINE
        else:
            share = _weighted(right, labels, split.labels)
            low = share < expected - 0.02 - 3 * math.sqrt(expected * (1 - expected) / len(labels))
            fine = not low
        if now is None:
            line = f"the model takes no images of {pictures.now.size} x {pictures.now.size} pixels"
        elif fine:
            return Finding(line, low)
        search = _Search(model, pictures, device)
        best = search.best(now, own, advised, track)
        if best:
            check_outputs(best.seen.logits, len(classes))
    return Finding(line, low) if best is None else _told(Finding(line, low), best, search, classes)


def _weighted(right: Tensor, labels: Tensor, everywhere: Tensor) -> float:
    """The accuracy on a sample with each class as frequent as it is everywhere."""
    frequent = torch.bincount(everywhere).double() / torch.bincount(labels, minlength=int(everywhere.max()) + 1)
    weight = frequent[labels]
    return float((right * weight).sum() / weight.sum())


@dataclass(frozen=True)
class _Tried:
    """A look, and whether the classes are taken in another order as well.

    Attributes:
        gain: Beyond the accuracy on the same images as they are shown now.
    """

    look: Look
    reordered: bool
    changes: int
    seen: Seen
    accuracy: float
    gain: float

    @property
    def helps(self) -> bool:
        """Whether the gain is large, and more than the sample explains."""
        return self.changes > 0 and self.gain >= max(_GAIN, 2 * math.sqrt(0.5 / len(self.seen.logits)))


class _Search:
    """Looks for the input and the order of classes with which a model is right."""

    def __init__(self, model: nn.Module, pictures: Pictures, device: torch.device | str) -> None:
        self.model, self.pictures, self.device = model, pictures, device

    def best(
        self,
        now: Seen | None,
        own: tuple[Sequence[float], Sequence[float]] | None,
        advised: Preprocessing | None,
        track: Track,
    ) -> _Tried | None:
        """The smallest change that explains the most; ``None`` if none explains anything.

        Sizes come from the cheapest on, the present one always, until something explains all.
        """
        pictures, here = self.pictures, self.pictures.now
        self._now = now.says if now else torch.full_like(pictures.labels, -1)
        tried = self._judged(here, now) if now else []
        order = sorted({here.size, *sizes(pictures, advised)}, key=lambda size: (size > max(here.size, _CHEAP), size))
        explained = False
        with track("preflight: other sizes and normalisations", len(order)) as advance:
            for size in order:
                before, explained = explained, max((one.accuracy for one in tried), default=0.0) >= _EXPLAINED
                dear = size > _CHEAP
                # The size after the one that explains all may be nearer yet.
                if size == here.size or not explained or not (before or dear):
                    number = _DEAR if dear else _SCREEN
                    looks = [Look(size, n) for n in normalisations(pictures, size, own, advised)]
                    found = self._all([look for look in looks if look != here], number)
                    if pictures.colour:
                        top = max(found, key=_merit).look if found else here
                        found += self._all(dict.fromkeys([*top.turned(), *looks[0].turned()]), number)
                    tried += found
                advance()
            return self._chosen(tried)

    def _all(self, looks: Iterable[Look], number: int) -> list[_Tried]:
        found = []
        for look in looks:
            if seen := see(self.model, self.pictures, look, number, self.device):
                found += self._judged(look, seen)
        return found

    def _judged(self, look: Look, seen: Seen) -> list[_Tried]:
        """A look as it is, and with the classes in another order where that is much better."""
        number = len(seen.logits)
        labels, says = self.pictures.labels[:number], seen.says
        then = (says == labels).double().mean().item()
        now = (self._now[:number] == labels).double().mean().item()
        changes = look.changes(self.pictures.now)
        found = [_Tried(look, False, changes, seen, then, then - now)]
        moved = _crossed(says.numpy(), labels.numpy(), self.pictures.rounds[:number].numpy() % 2 == 0)
        other = replace(found[0], reordered=True, changes=changes + 1, accuracy=moved, gain=moved - now)
        return [*found, other] if moved - then >= _GAIN and other.helps else found

    def _chosen(self, tried: Sequence[_Tried]) -> _Tried | None:
        """Of those that did best, all on the same images, the smallest change that is as good as the best."""
        helping = sorted((one for one in tried if one.gain >= _GAIN / 2 and one.changes), key=_merit, reverse=True)
        final = []
        for one in [one for one in helping[:_FINALISTS] if _merit(one) >= _merit(helping[0]) - _GAIN]:
            enough = len(one.seen.logits) >= min(_CONFIRM, len(self.pictures.labels))
            again = [one] if enough else self._all([one.look], _CONFIRM)
            final += [found for found in again if found.reordered == one.reordered and found.helps]
        if not final:
            return None
        most = max(one.accuracy for one in final)
        equal = [one for one in final if one.accuracy >= most - _EQUAL]
        fewest = min(one.changes for one in equal)
        return min((one for one in equal if one.changes == fewest), key=lambda one: (one.seen.drift, self._loss(one)))

    def _loss(self, one: _Tried) -> float:
        """Cross-entropy of the right answers."""
        labels = self.pictures.labels[: len(one.seen.logits)]
        if one.reordered:
            back = {label: output for output, label in _match(one.seen.says.numpy(), labels.numpy()).items()}
            labels = torch.tensor([back.get(label, 0) for label in labels.tolist()])
        return functional.cross_entropy(one.seen.logits, labels).item()


def _merit(one: _Tried) -> float:
    return one.accuracy - _EQUAL * one.changes


def _crossed(says: np.ndarray, labels: np.ndarray, halves: np.ndarray) -> float:
    """Accuracy with the best one-to-one match of outputs and labels, judged on other images.

    One half of the images gives the match and the other half its accuracy, both ways; a match that is judged on what
    made it is better than chance for nothing.
    """
    hits = 0
    for half in (halves, ~halves):
        match = _match(says[half], labels[half])
        hits += sum(match.get(int(output)) == label for output, label in zip(says[~half], labels[~half], strict=True))
    return hits / len(labels)


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


def _told(finding: Finding, best: _Tried, search: _Search, classes: Sequence[str]) -> Finding:
    """The finding with the cause in words, and what to write into the config."""
    look, now = best.look, search.pictures.now
    ways: list[str] = []
    settings: dict[str, Any] = {}
    hints: list[str] = []
    if look.size != now.size:
        ways.append(f"images of {look.size} x {look.size} pixels")
        settings["data.image_size"] = look.size
    if look.bgr != now.bgr:
        ways.append("red and blue exchanged")
        settings["model.channel_order"] = "bgr" if look.bgr else "rgb"
    if look.renormalised(now):
        ways.append(look.normalisation.name)
    # What is not written into the config follows the order of channels by itself, and what is written does not.
    uneven = any(len(set(values)) > 1 for values in (look.normalisation.mean, look.normalisation.std))
    if look.renormalised(now) or (look.bgr != now.bgr and uneven):
        for key, values in (("model.mean", look.normalisation.mean), ("model.std", look.normalisation.std)):
            settings[key] = [float(f"{value:.4g}") for value in values]
    if settings:
        set_ = [f"{key}: {_yaml(value)}" for key, value in settings.items()]
        hints.insert(0, f"Set {', '.join(set_[:-1])}{' and ' if len(set_) > 1 else ''}{set_[-1]}.")
    cause = f"with {_and(ways)}" if ways else ""
    if best.reordered:
        told, order, advice = _order(best, search, classes)
        cause = f"{told}. In the other order{f' and {cause}' if cause else ''}"
        hints.append(advice)
        settings |= {"model.classes": order} if order else {}
    cause += f" it would be {100 * best.accuracy:.0f}%"
    return replace(finding, cause=cause, hint="\n".join(hints), settings=settings)


def _order(best: _Tried, search: _Search, classes: Sequence[str]) -> tuple[str, list[str] | None, str]:
    """The other order of the classes: in words, as names where it is whole, and what to do."""
    says = best.seen.says.numpy()
    match = _match(says, search.pictures.labels[: len(says)].numpy())
    moved = [(output, label) for output, label in sorted(match.items()) if output != label]
    told = ", ".join(f"{classes[output]!r} for images of {classes[label]!r}" for output, label in moved[:3])
    more = f" and so on, {len(moved)} classes in all" if len(moved) > 3 else ""
    order = [classes[match[output]] for output in range(len(classes))] if len(match) == len(classes) else None
    advice = "Give model.classes the names in the order of the model's outputs"
    shown = f"; by what it says that is: [{', '.join(map(repr, order))}]" if order and len(order) <= 20 else ""
    return f"the order of the classes differs: the model says {told}{more}", order, f"{advice}{shown}."


def _yaml(value: Any) -> str:
    return f"[{', '.join(f'{v:g}' for v in value)}]" if isinstance(value, list) else str(value)


def _and(ways: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(ways[:-1]), ways[-1]]))
