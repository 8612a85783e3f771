"""Passes in which nothing is learned: logits, features and accuracy of a split, batch by batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megu_cli.data import Split
from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.execution.runtime import Track, silent
from megu_cli.models.features import evaluating, penultimate


@dataclass(frozen=True)
class Outputs:
    """What a model says of a list of samples: logits (N, K) and penultimate features (N, D), on the CPU."""

    logits: Tensor
    features: Tensor

    def at(self, index: Tensor) -> Outputs:
        """The rows at ``index``."""
        return Outputs(self.logits[index], self.features[index])


def eval_batch(size: Sequence[int]) -> int:
    """Images per forward pass where nothing is learned: 1,000, fewer of more than 64x64 pixels, at equal memory.

    Args:
        size: Height and width.
    """
    return max(1, min(1000, 1000 * 64 * 64 // math.prod(size)))


def predict(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    classes: int,
    features: bool = True,
    batch: int = 1000,
    device: torch.device | str = "cpu",
    label: str = "predict",
    crew: Processes = SINGLE,
    track: Track = silent,
) -> Outputs:
    """Logits and penultimate features of ``split`` at ``index``, in eval mode; the model is left as it was.

    Without ``features`` there are none, and the model's last layer may be any. Several processes predict a part each
    and all get the whole.
    """
    shared = len(index) >= crew.world
    index = index[crew.slice(len(index))]
    logits: list[Tensor] = []
    collecting: contextlib.AbstractContextManager[list[Tensor]] = (
        penultimate(model, classes) if features else contextlib.nullcontext([])
    )
    with (
        evaluating(model),
        torch.inference_mode(),
        collecting as collected,
        track(label, math.ceil(len(index) / batch)) as advance,
    ):
        for _, x in split.pass_over(index, batch, device):
            logits.append(model(x).float().cpu())
            advance()
    if not logits:
        return Outputs(torch.empty(0, classes), torch.empty(0, 0))
    seen = torch.cat(collected).float().cpu() if features else torch.empty(len(index), 0)
    said = torch.cat(logits)
    return Outputs(crew.gather(said), crew.gather(seen)) if shared else Outputs(said, seen)


def outputs(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    classes: int,
    batch: int = 1000,
    device: torch.device | str = "cpu",
    label: str = "predict",
    crew: Processes = SINGLE,
    track: Track = silent,
) -> Iterator[tuple[Tensor, Outputs]]:
    """(positions, `Outputs`) batch by batch, in eval mode; the model is left as it was.

    Several processes predict a part of each batch and all get the whole.
    """
    order = list(index.split(batch))
    shared = [len(positions) >= crew.world for positions in order]
    parts = [p[crew.slice(len(p))] if many else p for p, many in zip(order, shared, strict=True)]
    with evaluating(model), penultimate(model, classes) as features, track(label, len(order)) as advance:
        for positions, many, x in zip(order, shared, split.batches(parts, device), strict=True):
            with torch.inference_mode():
                said, seen = model(x).float().cpu(), features.pop().float().cpu()
            yield positions, Outputs(crew.gather(said), crew.gather(seen)) if many else Outputs(said, seen)
            advance()


def accuracy(
    model: nn.Module,
    split: Split,
    index: Tensor,
    device: torch.device | str = "cpu",
    crew: Processes = SINGLE,
    batch: int = 1000,
) -> float:
    """Share of ``index`` that the model, in eval mode, classifies as labelled; ``batch`` samples per forward pass."""
    hits = 0
    with torch.inference_mode():
        for positions, x in split.pass_over(index[crew.slice(len(index))], batch, device):
            hits += int((model(x).argmax(1).cpu() == split.labels[positions]).sum())
    if len(index) >= crew.world:
        hits = int(crew.gather(torch.tensor([hits])).sum())
    return hits / len(index)
