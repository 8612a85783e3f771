"""The one training loop, below method/ and baselines/: they differ in their batches and their loss only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.errors import MeguError
from megu_cli.models import penultimate
from megu_cli.runtime import Track, generator, seeded, silent

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class History:
    """What a training did: mean loss, and validation accuracy where there is validation, per epoch."""

    loss: list[float]
    validation: list[float]
    steps: int


def fit(
    model: nn.Module,
    *,
    epochs: int,
    steps: int,
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    label: str,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    track: Track = silent,
) -> History:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: The model; its parameters are those of the optimizer.
        epochs: Passes at most.
        steps: Batches per epoch.
        batches: Epoch number -> its batches.
        loss: Model and batch -> scalar loss.
        optimizer: Stepped after every batch.
        scheduler: Stepped after every batch.
        seed: Of what the model itself draws (dropout).
        label: Name of the work, for progress and errors.
        validate: Model in eval mode -> validation accuracy, called after each epoch.
        patience: Stop after so many epochs without a gain in validation accuracy.
        track: Reports progress.

    Raises:
        MeguError: The loss is no longer finite.
    """
    losses: list[float] = []
    scores: list[float] = []
    device = next(model.parameters()).device
    with track(label, epochs * steps) as advance:
        for epoch in range(epochs):
            model.train()
            total = torch.zeros((), device=device)
            with seeded(seed, label, epoch):
                for batch in batches(epoch):
                    value = loss(model, batch)
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    optimizer.step()
                    scheduler.step()
                    total += value.detach()
                    advance()
            model.eval()
            losses.append(total.item() / steps)
            if not math.isfinite(losses[-1]):
                raise MeguError(
                    f"{label}: the loss is {losses[-1]} after epoch {epoch + 1}",
                    "A lower learning rate may help.",
                )
            if validate is not None:
                scores.append(validate(model))
                if patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience:
                    break
    return History(losses, scores, steps * len(losses))


def train_classifier(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    epochs: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    augment: str,
    seed: int,
    label: str,
    validate: Callable[[nn.Module], float] | None = None,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> History:
    """Train a classifier in place by one-cycle SGD with Nesterov momentum and cross-entropy.

    Args:
        model: Freshly initialised, on ``device``.
        split: Where the training images are.
        index: (N,) positions to train on.
        epochs: Passes.
        batch: Samples per step.
        lr: Peak learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        augment: ``none``, ``flip`` or ``crop+flip`` (4 pixels of zero padding).
        seed: Of order, augmentation and dropout.
        label: ``train`` or ``oracle``: names the random streams and the progress.
        validate: Model in eval mode -> validation accuracy, called after each epoch.
        device: Where to train.
        track: Reports progress.
    """
    steps = math.ceil(len(index) / batch)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = shuffled(index, len(index), batch, seed, label, epoch)
        draw = generator(seed, label, epoch, "augment")
        for positions, x in zip(order, split.batches(order, device), strict=True):
            yield _augmented(x, augment, draw), split.labels[positions].to(device)

    return fit(
        model,
        epochs=epochs,
        steps=steps,
        batches=batches,
        loss=lambda net, pair: functional.cross_entropy(net(pair[0]), pair[1]),
        optimizer=optimizer,
        scheduler=scheduler,
        seed=seed,
        label=label,
        validate=validate,
        track=track,
    )


def shuffled(index: Tensor, number: int, size: int, seed: int, *path: object) -> list[Tensor]:
    """``number`` positions out of ``index`` in random order, cut into batches of ``size``.

    Where ``number`` is more than there are, the permuted positions start over: nothing comes a second time before
    everything has come once.
    """
    draw = generator(seed, *path, "order")
    passes = [index[torch.randperm(len(index), generator=draw)] for _ in range(math.ceil(number / len(index)))]
    return list(torch.cat(passes)[:number].split(size))


def _augmented(x: Tensor, kind: str, draw: torch.Generator) -> Tensor:
    if kind == "none":
        return x
    flip = torch.rand(len(x), 1, 1, 1, generator=draw).to(x.device) < 0.5
    x = torch.where(flip, x.flip(3), x)
    if kind == "crop+flip":
        _, _, height, width = x.shape
        padded = functional.pad(x, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2, len(x)), generator=draw).to(x.device)
        rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
        sample = torch.arange(len(x), device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        x = padded[sample, channel, rows, columns].contiguous(memory_format=torch.channels_last)
    return x


@dataclass(frozen=True)
class Outputs:
    """What a model says of a list of samples: logits (N, K) and penultimate features (N, D), on the CPU."""

    logits: Tensor
    features: Tensor

    def at(self, index: Tensor) -> Outputs:
        """The rows at ``index``."""
        return Outputs(self.logits[index], self.features[index])


def predict(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    classes: int,
    batch: int = 1000,
    device: torch.device | str = "cpu",
    label: str = "predict",
    track: Track = silent,
) -> Outputs:
    """Logits and penultimate features of ``split`` at ``index``, in eval mode; the model is left as it was."""
    was_training = model.training
    model.eval()
    logits: list[Tensor] = []
    try:
        with (
            torch.inference_mode(),
            penultimate(model, classes) as features,
            track(label, math.ceil(len(index) / batch)) as advance,
        ):
            for _, x in split.pass_over(index, batch, device):
                logits.append(model(x).float().cpu())
                advance()
        if not logits:
            return Outputs(torch.empty(0, classes), torch.empty(0, 0))
        return Outputs(torch.cat(logits), torch.cat(features).float().cpu())
    finally:
        model.train(was_training)


def outputs(
    model: nn.Module,
    split: Split,
    index: Tensor,
    *,
    classes: int,
    batch: int = 1000,
    device: torch.device | str = "cpu",
    label: str = "predict",
    track: Track = silent,
) -> Iterator[tuple[Tensor, Outputs]]:
    """(positions, `Outputs`) batch by batch, in eval mode; the model is left as it was."""
    was_training = model.training
    model.eval()
    try:
        with penultimate(model, classes) as features, track(label, math.ceil(len(index) / batch)) as advance:
            for positions, x in split.pass_over(index, batch, device):
                with torch.inference_mode():
                    says = Outputs(model(x).float().cpu(), features.pop().float().cpu())
                yield positions, says
                advance()
    finally:
        model.train(was_training)


def accuracy(model: nn.Module, split: Split, index: Tensor, device: torch.device | str = "cpu") -> float:
    """Share of ``index`` that the model, in eval mode, classifies as labelled."""
    hits = 0
    with torch.inference_mode():
        for positions, x in split.pass_over(index, 1000, device):
            hits += int((model(x).argmax(1).cpu() == split.labels[positions]).sum())
    return hits / len(index)


@contextlib.contextmanager
def masked_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply gradients by masks for a block, before momentum: with 0, and no weight decay, a weight never moves.

    Args:
        model: The model.
        masks: Parameter name -> factor of the parameter's shape; the others are left alone.
    """
    parameters = dict(model.named_parameters())
    hooks = [parameters[key].register_hook(mask.mul) for key, mask in masks.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
