"""Passes in which nothing is learned: logits, features and accuracy of a split, batch by batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.models.features import evaluating, penultimate


@dataclass(frozen=True)
class Outputs:
    """What a model says of a list of samples: logits (N, K) and penultimate features (N, D), on the CPU."""

    logits: Tensor
    features: Tensor

    def at(self, index: Tensor) -> Outputs:
        """The rows at ``index``."""
        return Outputs(self.logits[index], self.features[index])


def eval_batch(size: Sequence[int], device: torch.device) -> int:
    """Images per forward pass where nothing is learned, by memory: fewer of more than 64x64 pixels.

    A CPU gets at most 250 images of any size: what the layers of a small network pass on then stays in its cache, and
    the pass takes two thirds of the time that it takes with 1,000.

    Args:
        size: Height and width.
        device: Where the model is.
    """
    most = 250 if device.type == "cpu" else 1000
    return max(1, min(most, 1000 * 64 * 64 // math.prod(size)))


def predict(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    classes: int,
    features: bool = True,
    label: str = "predict",
    execution: Execution = LOCAL,
) -> Outputs:
    """Return logits and penultimate features of ``split`` at ``index``, in eval mode; the model is left as it was.

    Several processes predict a part each and all get the whole.

    Args:
        model: The model, on the device.
        split: The images.
        index: (N,) positions.
        classes: Number of classes K.
        features: ``False``: return no features; the model's last layer may then be of any kind.
        label: Names the progress.
        execution: Device, samples per forward pass, processes and progress.
    """
    processes, batch = execution.processes, execution.eval_batch
    shared = len(index) >= processes.world
    index = index[processes.slice(len(index))]
    logits: list[Tensor] = []
    collecting: contextlib.AbstractContextManager[list[Tensor]] = (
        penultimate(model, classes) if features else contextlib.nullcontext([])
    )
    with (
        evaluating(model),
        torch.inference_mode(),
        collecting as collected,
        execution.track(label, math.ceil(len(index) / batch)) as advance,
    ):
        for _, x in split.pass_over(index, batch, execution.device):
            logits.append(model(x).float().cpu())
            advance()
    if not logits:
        return Outputs(torch.empty(0, classes), torch.empty(0, 0))
    seen = torch.cat(collected).float().cpu() if features else torch.empty(len(index), 0)
    said = torch.cat(logits)
    return Outputs(processes.gather(said), processes.gather(seen)) if shared else Outputs(said, seen)


def outputs(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    classes: int,
    label: str = "predict",
    execution: Execution = LOCAL,
) -> Iterator[tuple[Tensor, Outputs]]:
    """Yield (positions, `Outputs`) batch by batch, in eval mode; the model is left as it was.

    The arguments are those of `predict`. Several processes predict a part of each batch and all get the whole.
    """
    processes = execution.processes
    order = list(index.split(execution.eval_batch))
    shared = [len(positions) >= processes.world for positions in order]
    parts = [p[processes.slice(len(p))] if many else p for p, many in zip(order, shared, strict=True)]
    tracked = execution.track(label, len(order))
    with evaluating(model), penultimate(model, classes) as features, tracked as advance:
        for positions, many, x in zip(order, shared, split.batches(parts, execution.device), strict=True):
            with torch.inference_mode():
                said, seen = model(x).float().cpu(), features.pop().float().cpu()
            yield positions, Outputs(processes.gather(said), processes.gather(seen)) if many else Outputs(said, seen)
            advance()


def accuracy(model: nn.Module, split: Split, index: Tensor, execution: Execution = LOCAL) -> float:
    """Return the share of ``index`` that the model, in eval mode, classifies as labelled."""
    hits, processes = 0, execution.processes
    with torch.inference_mode():
        part = index[processes.slice(len(index))]
        for positions, x in split.pass_over(part, execution.eval_batch, execution.device):
            hits += int((model(x).argmax(1).cpu() == split.labels[positions]).sum())
    if len(index) >= processes.world:
        hits = int(processes.gather(torch.tensor([hits])).sum())
    return hits / len(index)
