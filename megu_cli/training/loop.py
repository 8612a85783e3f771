"""The one training loop, below method/ and baselines/: they differ in their batches and their loss only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.config import TrainConfig
from megu_cli.data import Split
from megu_cli.errors import DivergedError
from megu_cli.execution import LOCAL, Execution
from megu_cli.execution.runtime import autocast, draws_on, draws_so_far, generator, seeded

Batch = TypeVar("Batch")
# Steps between two moments at which several processes agree whether to save the state.
_AGREE = 16


@dataclass(frozen=True)
class History:
    """Record of a training: mean loss and, with validation, validation accuracy per epoch."""

    loss: list[float]
    validation: list[float]
    steps: int


@dataclass(frozen=True)
class Duration:
    """Length of a training.

    Attributes:
        epochs: Maximum number of epochs.
        steps: Batches per epoch.
        max_steps: Maximum number of steps; ``None``: no limit but the epochs.
        patience: Stop after this many epochs without a gain in validation accuracy; ``None``: never.
    """

    epochs: int
    steps: int
    max_steps: int | None = None
    patience: int | None = None

    @property
    def total(self) -> int:
        """Maximum number of steps of the whole training."""
        whole = self.epochs * self.steps
        return min(whole, self.max_steps or whole)

    def stalled(self, scores: list[float]) -> bool:
        """True if the best score is ``patience`` epochs old."""
        return (
            bool(scores) and self.patience is not None and len(scores) - 1 - scores.index(max(scores)) >= self.patience
        )


def fit(
    model: nn.Module,
    duration: Duration,
    *,
    batches: Callable[[int, int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    label: str,
    slices: Callable[[Batch], Sequence[Batch]] = lambda batch: [batch],
    validate: Callable[[nn.Module], float] | None = None,
    memory: dict[str, Tensor] | None = None,
    execution: Execution = LOCAL,
) -> History:
    """Train ``model`` in place and leave it in eval mode.

    A resumed training ends with the same bytes as one that was never interrupted.

    Args:
        model: The model, on its device; its parameters are those of the optimizer.
        duration: Number of epochs and steps.
        batches: Epoch number and first step -> the batches of the epoch from that step on. Its draws depend on the
            epoch and on a batch's place in the epoch, not on the first step. An epoch without a batch is the
            end of the training.
        loss: Model and batch, or a slice of it -> scalar loss. The sum over the slices, as the mean over the processes,
            is the loss of the whole batch.
        optimizer: Stepped after every batch.
        scheduler: Stepped after every batch.
        label: Name of the work, for random streams, progress and errors.
        slices: Batch -> its slices. They are computed one after the other, and their gradients are summed before the
            step. Each process has as many.
        validate: Model in eval mode -> validation accuracy, called after each epoch.
        memory: State of the loss between steps, the same in all processes; saved with the training.
        execution: Seed of the model's own draws (dropout), processes, progress and resume point. Each process gets
            its part of a batch from ``batches``.

    Raises:
        DivergedError: The loss is no longer finite.
    """
    state = _Training(model, optimizer, scheduler, {} if memory is None else memory, execution)
    state.restore()
    rank = execution.processes.rank
    with (
        execution.processes.joined(model) as net,
        execution.track(label, duration.total - state.done) as advance,
    ):
        for epoch in range(len(state.losses), duration.epochs):
            if (state.done == duration.max_steps and not state.at) or duration.stalled(state.scores):
                break
            model.train()
            with seeded(execution.seed, label, epoch, *([rank] if rank else [])):
                for batch in batches(epoch, state.at):
                    if state.done == duration.max_steps:
                        break
                    state.step(net, batch, loss, slices)
                    advance()
                    state.save_if_due()
            model.eval()
            if not state.at:
                break
            state.end_epoch(label)
            if validate is not None:
                state.scores.append(validate(model))
            state.save_if_due()
    model.eval()
    return History(state.losses, state.scores, state.done)


class _Training:
    """A training under way: model, optimizer and scheduler, and the progress so far.

    Attributes:
        done: Steps of the whole training.
        at: Steps of the current epoch.
        losses: Mean loss of each finished epoch.
        scores: Validation accuracy of each finished epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        memory: dict[str, Tensor],
        execution: Execution,
    ) -> None:
        self._model, self._optimizer, self._scheduler, self._memory = model, optimizer, scheduler, memory
        self._processes, self._resume = execution.processes, execution.resume
        self._device = next(model.parameters()).device
        self.done = self.at = 0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self._total = torch.zeros((), device=self._device)  # sum of the losses of the current epoch
        self._draws: list[Tensor] | None = None

    def restore(self) -> None:
        """Load the saved state, if there is one."""
        if self._resume is None or (saved := self._resume.load()) is None:
            return
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._scheduler.load_state_dict(saved["scheduler"])
        self._memory.update(saved["memory"])
        self.done, self.at = saved["done"], saved["at"]
        if self.at:  # a new epoch seeds its own draws
            # A copy: torch misreads a state that does not begin its storage.
            self._draws = [row[self._processes.rank].clone() for row in saved["draws"]]
        self._total += saved["total"].to(self._device)  # the mean over the processes, as all that is added to it
        self.losses, self.scores = saved["losses"], saved["scores"]

    def step(
        self,
        net: nn.Module,
        batch: Batch,
        loss: Callable[[nn.Module, Batch], Tensor],
        slices: Callable[[Batch], Sequence[Batch]],
    ) -> None:
        """Take one optimizer step."""
        if self._draws is not None:
            # Only now, after the first batch: to begin reading the images draws from the same stream.
            draws_on(self._draws, self._device)
            self._draws = None
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._device):
            parts = slices(batch)
        for part in parts:
            with autocast(self._device):
                value = loss(net, part)
            # Several processes average all of the gradient after each slice: what is the same in all stays as it is.
            value.backward()
            self._total += value.detach()
        self._optimizer.step()
        self._scheduler.step()
        self.done, self.at = self.done + 1, self.at + 1

    def end_epoch(self, label: str) -> None:
        """Record the mean loss of the epoch.

        Raises:
            DivergedError: It is not finite.
        """
        self.losses.append(self._processes.mean(self._total).item() / self.at)
        self.at, self._draws = 0, None
        self._total.zero_()
        if not math.isfinite(self.losses[-1]):
            raise DivergedError(
                f"{label}: the loss is {self.losses[-1]} after epoch {len(self.losses)}",
                "A lower learning rate may help.",
            )

    def save_if_due(self) -> None:
        """Save the state if it is time to."""
        processes = self._processes
        # The processes have to agree, which is not worth it at every step.
        skipped = processes.world > 1 and self.done % _AGREE
        if self._resume is None or skipped or not processes.agreed(self._resume.due()):
            return
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "memory": self._memory,
            "done": self.done,
            "at": self.at,
            "draws": [processes.gather(row[None]) for row in draws_so_far(self._device)],
            "total": processes.mean(self._total),
            "losses": self.losses,
            "scores": self.scores,
        }
        if processes.first:
            self._resume.save(state)


def train_classifier(
    model: nn.Module,
    split: Split,
    index: Tensor,
    settings: TrainConfig,
    *,
    label: str,
    validate: Callable[[nn.Module], float] | None = None,
    execution: Execution = LOCAL,
) -> History:
    """Train a classifier in place on cross-entropy, with a one-cycle schedule of the learning rate.

    Args:
        model: A newly initialised model, on its device.
        split: The training images.
        index: (N,) positions to train on.
        settings: The section ``train`` of the config.
        label: ``train`` or ``oracle``: names the random streams and the progress.
        validate: Model in eval mode -> validation accuracy, called after each epoch.
        execution: See `fit`; the seed also draws order and augmentation.
    """
    processes, seed, size = execution.processes, execution.seed, settings.batch
    steps = math.ceil(len(index) / size)
    optimizer = _optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.peak_lr, total_steps=settings.epochs * steps)

    def batches(epoch: int, first: int) -> Iterator[_Samples]:
        order = shuffled(index, len(index), size, seed, label, epoch)
        draw = generator(seed, label, epoch, "augment")
        changes = [_drawn(len(positions), settings.augment, draw) for positions in order][first:]
        sizes = [len(positions) for positions in order[first:]]
        order = [positions[processes.slice(len(positions))] for positions in order[first:]]
        images = split.batches(order, execution.device)
        for positions, change, number, x in zip(order, changes, sizes, images, strict=True):
            part = change.at(processes.slice(number)) if change else None
            labels = split.labels[positions].to(execution.device)
            count = processes.slices(number, settings.accumulate)
            yield _Samples(_augmented(x, part), labels, processes.weight(number), count)

    def loss(net: nn.Module, batch: _Samples) -> Tensor:
        return functional.cross_entropy(net(batch.images), batch.labels) * batch.weight

    return fit(
        model,
        Duration(settings.epochs, steps),
        batches=batches,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        label=label,
        slices=_Samples.cut,
        validate=validate,
        execution=execution,
    )


@dataclass(frozen=True)
class _Samples:
    """B samples of a step, the weight of their mean loss, and in how many slices they are computed."""

    images: Tensor
    labels: Tensor
    weight: float
    slices: int

    def cut(self) -> list[_Samples]:
        """The slices; their losses add up to that of all."""
        number = len(self.labels)
        return [
            _Samples(self.images[part], self.labels[part], self.weight * (part.stop - part.start) / number, 1)
            for part in cut(number, self.slices)
        ]


def cut(number: int, slices: int) -> list[slice]:
    """Cut ``number`` samples into slices of equal length, or one more; some are empty where there are fewer samples."""
    return [slice(number * k // slices, number * (k + 1) // slices) for k in range(slices)]


def _optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), settings.peak_lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        settings.peak_lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
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
