"""The one training loop, below method/ and baselines/: they differ in their batches and their loss only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.errors import MeguError
from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.execution.runtime import Track, autocast, draws_on, draws_so_far, generator, seeded, silent

Batch = TypeVar("Batch")
# Steps between two moments at which several processes agree whether to leave a checkpoint.
_AGREE = 16


@dataclass(frozen=True)
class History:
    """What a training did: mean loss, and validation accuracy where there is validation, per epoch."""

    loss: list[float]
    validation: list[float]
    steps: int


class Checkpoints(Protocol):
    """Keeps what a training needs to go on where it was cut short; where, and how often, it knows itself."""

    def load(self) -> dict[str, Any] | None:
        """What was last saved by the same work; ``None`` where there is nothing."""

    def due(self) -> bool:
        """Whether it is time to save."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was saved."""


def fit(
    model: nn.Module,
    *,
    epochs: int,
    steps: int,
    batches: Callable[[int, int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    label: str,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    limit: int | None = None,
    memory: dict[str, Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
    crew: Processes = SINGLE,
    track: Track = silent,
) -> History:
    """Train ``model`` in place and leave it in eval mode.

    A training that goes on from a checkpoint ends with the same bytes as one that was never cut short.

    Args:
        model: The model; its parameters are those of the optimizer.
        epochs: Passes at most.
        steps: Batches per epoch.
        batches: Epoch number and first step -> the epoch's batches from that step on; what it draws depends on the
            epoch and the place of a batch in it, not on where it begins.
        loss: Model and batch -> scalar loss; its average over the processes is the loss of the whole batch.
        optimizer: Stepped after every batch.
        scheduler: Stepped after every batch.
        seed: Of what the model itself draws (dropout).
        label: Name of the work, for progress and errors.
        validate: Model in eval mode -> validation accuracy, called after each epoch.
        patience: Stop after so many epochs without a gain in validation accuracy.
        limit: Stop after so many steps, where that is earlier.
        memory: What the loss keeps from one step to the next, the same in all processes.
        checkpoints: Where to go on from, and where to leave what a later call goes on from.
        crew: The processes that share the work; ``batches`` gives this one's part.
        track: Reports progress.

    Raises:
        MeguError: The loss is no longer finite.
    """
    device = next(model.parameters()).device
    done = at = 0  # steps of the whole training, and of its current epoch
    total = torch.zeros((), device=device)
    losses: list[float] = []
    scores: list[float] = []
    memory = {} if memory is None else memory
    draws: list[Tensor] | None = None
    if checkpoints is not None and (saved := checkpoints.load()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        memory.update(saved["memory"])
        done, at = saved["done"], saved["at"]
        # An epoch seeds its own. (A copy: torch misreads a state that does not begin its storage.)
        draws = [row[crew.rank].clone() for row in saved["draws"]] if at else None
        total += saved["total"].to(device)  # the mean over the processes: so is what they add to it
        losses, scores = saved["losses"], saved["scores"]

    def keep() -> None:
        # Several processes have to agree, which is not worth it at every step.
        if checkpoints is None or (crew.world > 1 and done % _AGREE) or not crew.agreed(checkpoints.due()):
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "memory": memory,
            "done": done,
            "at": at,
            "draws": [crew.gather(row[None]) for row in draws_so_far(device)],
            "total": crew.mean(total),
            "losses": losses,
            "scores": scores,
        }
        if crew.first:
            checkpoints.save(state)

    whole = min(epochs * steps, limit or epochs * steps)
    with crew.joined(model) as net, track(label, whole - done) as advance:
        for epoch in range(len(losses), epochs):
            if (done == limit and not at) or _stalled(scores, patience):
                break
            model.train()
            with seeded(seed, label, epoch, *([crew.rank] if crew.rank else [])):
                for batch in batches(epoch, at):
                    if done == limit:
                        break
                    if draws is not None:
                        # Only now: to begin reading the images draws from the same stream.
                        draws_on(draws, device)
                        draws = None
                    with autocast(device):
                        value = loss(net, batch)
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    optimizer.step()
                    scheduler.step()
                    total += value.detach()
                    done, at = done + 1, at + 1
                    advance()
                    keep()
            model.eval()
            losses.append(crew.mean(total).item() / at)
            at, draws = 0, None
            total.zero_()
            if not math.isfinite(losses[-1]):
                raise MeguError(
                    f"{label}: the loss is {losses[-1]} after epoch {epoch + 1}",
                    "A lower learning rate may help.",
                )
            if validate is not None:
                scores.append(validate(model))
            keep()
    model.eval()
    return History(losses, scores, done)


def _stalled(scores: list[float], patience: int | None) -> bool:
    """Whether the best score is ``patience`` epochs old."""
    return bool(scores) and patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience


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
    checkpoints: Checkpoints | None = None,
    crew: Processes = SINGLE,
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
        checkpoints: See `fit`.
        crew: The processes that share the work.
        track: Reports progress.
    """
    steps = math.ceil(len(index) / batch)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        order = shuffled(index, len(index), batch, seed, label, epoch)
        draw = generator(seed, label, epoch, "augment")
        changes = [_drawn(len(positions), augment, draw) for positions in order][first:]
        sizes = [len(positions) for positions in order[first:]]
        order = [positions[crew.slice(len(positions))] for positions in order[first:]]
        for positions, change, size, x in zip(order, changes, sizes, split.batches(order, device), strict=True):
            own = change.at(crew.slice(size)) if change else None
            yield _augmented(x, own), split.labels[positions].to(device), crew.weight(size)

    def loss(net: nn.Module, given: tuple[Tensor, Tensor, float]) -> Tensor:
        x, y, weight = given
        return functional.cross_entropy(net(x), y) * weight

    return fit(
        model,
        epochs=epochs,
        steps=steps,
        batches=batches,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        seed=seed,
        label=label,
        validate=validate,
        checkpoints=checkpoints,
        crew=crew,
        track=track,
    )


def shuffled(index: Tensor, number: int, size: int, seed: int, *path: object) -> list[Tensor]:
    """``number`` positions out of ``index`` in random order, cut into batches of ``size``.

    Where ``number`` is more than there are, the permuted positions start over: nothing comes a second time before
    everything has come once. A last batch of one sample takes one from the batch before it.
    """
    draw = generator(seed, *path, "order")
    passes = [index[torch.randperm(len(index), generator=draw)] for _ in range(math.ceil(number / len(index)))]
    batches = list(torch.cat(passes)[:number].split(size))
    if len(batches) > 1 and len(batches[-1]) == 1 and size > 2:
        # Batch norm cannot take the variance of one value: the last sample gets one of the batch before beside it.
        batches[-1] = torch.cat([batches[-2][-1:], batches[-1]])
        batches[-2] = batches[-2][:-1]
    return batches


@dataclass(frozen=True)
class _Augmentation:
    """What was drawn for B samples: (B, 1, 1, 1) bool flips, and (2, B) offsets of the crop where there is one."""

    flip: Tensor
    offset: Tensor | None

    def at(self, part: slice) -> _Augmentation:
        """That of some of the samples."""
        return _Augmentation(self.flip[part], None if self.offset is None else self.offset[:, part])


def _drawn(number: int, kind: str, draw: torch.Generator) -> _Augmentation | None:
    if kind == "none":
        return None
    flip = torch.rand(number, 1, 1, 1, generator=draw) < 0.5
    return _Augmentation(flip, torch.randint(0, 9, (2, number), generator=draw) if kind == "crop+flip" else None)


def _augmented(x: Tensor, change: _Augmentation | None) -> Tensor:
    if change is None:
        return x
    x = torch.where(change.flip.to(x.device), x.flip(3), x)
    if change.offset is not None:
        _, _, height, width = x.shape
        padded = functional.pad(x, (4, 4, 4, 4))
        top, left = change.offset.to(x.device)
        rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
        sample = torch.arange(len(x), device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        x = padded[sample, channel, rows, columns].contiguous(memory_format=torch.channels_last)
    return x


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
