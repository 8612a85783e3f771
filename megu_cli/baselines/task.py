"""What every method is given, and the batches and the loop that all of them share."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.execution.runtime import Track
from megu_cli.training import Duration, History, accuracy, fit, shuffled

# Of the methods that take D_r and D_f side by side, by default; what D_f's batches are sized for.
BASELINE_EPOCHS = 2

Batch = TypeVar("Batch")
# Of the model and what `Task.retained` or `Task.pairs` gives for a step.
RetainedLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
PairLoss = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A forget request as methods see it. An epoch is as long as one of MeGU's own finetuning.

    Attributes:
        split: The training images.
        retain: (N_r,) positions of D_r in it.
        forget: (N_f,) positions of D_f.
        validation: Held-out images of retained classes; no method trains on them.
        forgotten: Wholly forgotten classes; empty for a request of sub-classes or single images.
        classes: Number of classes K.
        fresh: Purpose -> a newly initialised model of the same architecture, on the device.
        samples: Retained samples per epoch; where D_r has fewer, it is gone through more than once.
        batch: Retained samples per step.
        forget_batch: Forgotten samples per step: where it is left to megu, as make three passes over D_f in
            `BASELINE_EPOCHS` epochs.
        execution: Where and how to compute.
    """

    split: Split
    retain: Tensor
    forget: Tensor
    validation: Split
    forgotten: list[int]
    classes: int
    fresh: Callable[[str], nn.Module]
    samples: int = 12_000
    batch: int = 128
    forget_batch: int = 64
    execution: Execution = LOCAL

    @property
    def seed(self) -> int:
        """Seed of all random draws."""
        return self.execution.seed

    @property
    def device(self) -> torch.device | str:
        """Device of the model and the batches."""
        return self.execution.device

    @property
    def track(self) -> Track:
        """Reports progress."""
        return self.execution.track

    @property
    def steps(self) -> int:
        """Steps of an epoch over retained samples."""
        return math.ceil(self.samples / self.batch)

    @property
    def forget_steps(self) -> int:
        """Steps of a pass over D_f."""
        return math.ceil(len(self.forget) / self.forget_batch)

    @property
    def labels(self) -> Tensor:
        """(N_f,) true labels of D_f."""
        return self.split.labels[self.forget]

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy on the retained validation images."""
        return accuracy(model, self.validation, torch.arange(len(self.validation)), self.execution.unshared)

    @property
    def of_forgotten_classes(self) -> Tensor:
        """(N_f,) bool: images of wholly forgotten classes, which may also be those of an earlier request."""
        return torch.isin(self.labels, torch.tensor(self.forgotten, dtype=torch.int64))

    @property
    def of_classes(self) -> bool:
        """True if all of D_f is of wholly forgotten classes."""
        return bool(self.of_forgotten_classes.all())

    def retained(self, *path: object) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of the `steps` batches of one epoch over D_r, in an order that ``path`` draws."""
        order = shuffled(self.retain, self.samples, self.batch, self.seed, *path, "retain")
        for positions, x in zip(order, self.split.batches(order, self.device), strict=True):
            yield x, self.split.labels[positions].to(self.device)

    def forgets(self, number: int, *path: object, batch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, slots) of ``number`` forgotten samples; slots count from 0 to N_f - 1, so ``task.labels[slots]``.

        Args:
            number: How many samples.
            path: Draws their order.
            batch: Samples per step, `forget_batch` unless it is given.
        """
        size = self.forget_batch if batch is None else batch
        order = shuffled(torch.arange(len(self.forget)), number, size, self.seed, *path, "forget")
        return zip(self.split.batches([self.forget[slots] for slots in order], self.device), order, strict=True)

    def pairs(self, *path: object) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(retained images, their labels, forgotten images, their slots) of the `steps` steps of one epoch."""
        both = zip(self.retained(*path), self.forgets(self.steps * self.forget_batch, *path), strict=True)
        return ((x, y, gone, slots) for (x, y), (gone, slots) in both)

    def fit_pairs(
        self, model: nn.Module, name: str, loss: PairLoss, *, epochs: int, lr: float, weight_decay: float = 5e-4
    ) -> History:
        """`fit` on retained and forgotten samples side by side.

        Args:
            model: Changed in place.
            name: Names the random streams and the progress.
            loss: The model, and retained images, their labels, forgotten images, their slots, as `pairs` gives them ->
                scalar loss.
            epochs: Passes of `steps` steps.
            lr: Learning rate at the start.
            weight_decay: Of SGD.
        """
        return self._fit_drawn(model, name, self.pairs, loss, epochs, lr, weight_decay)

    def fit_retained(self, model: nn.Module, name: str, loss: RetainedLoss, *, epochs: int, lr: float) -> History:
        """`fit` on retained samples alone; as `fit_pairs`, but ``loss`` takes their images and labels only."""
        return self._fit_drawn(model, name, self.retained, loss, epochs, lr)

    def fit_relabelled(
        self,
        model: nn.Module,
        name: str,
        labels: Callable[[int], Tensor],
        *,
        epochs: int,
        lr: float,
        weight_decay: float = 5e-4,
    ) -> History:
        """`fit` by cross-entropy on one shuffled data set: D_r as it is, and D_f with other labels.

        An epoch has `samples` of D_r, and of D_f as large a share.

        Args:
            model: Changed in place.
            name: Names the random streams and the progress.
            labels: Epoch number -> (N_f,) labels of D_f.
            epochs: Passes.
            lr: Learning rate at the start.
            weight_decay: Of SGD.
        """
        both = torch.cat([self.retain, self.forget])
        number = round(self.samples * len(both) / len(self.retain))

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            known = self.split.labels.clone()
            known[self.forget] = labels(epoch)
            order = shuffled(both, number, self.batch, self.seed, name, epoch, "relabelled")
            for positions, x in zip(order, self.split.batches(order, self.device), strict=True):
                yield x, known[positions].to(self.device)

        return self.fit(
            model,
            name,
            epochs=epochs,
            steps=math.ceil(number / self.batch),
            batches=batches,
            loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
            lr=lr,
            weight_decay=weight_decay,
        )

    def _fit_drawn(
        self,
        model: nn.Module,
        name: str,
        drawn: Callable[..., Iterator[tuple[Tensor, ...]]],
        loss: Callable[..., Tensor],
        epochs: int,
        lr: float,
        weight_decay: float = 5e-4,
    ) -> History:
        return self.fit(
            model,
            name,
            epochs=epochs,
            steps=self.steps,
            batches=lambda epoch: drawn(name, epoch),
            loss=lambda net, batch: loss(net, *batch),
            lr=lr,
            weight_decay=weight_decay,
        )

    def fit(
        self,
        model: nn.Module,
        label: str,
        *,
        epochs: int,
        steps: float,
        batches: Callable[[int], Iterable[Batch]],
        loss: Callable[[nn.Module, Batch], Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        optimizer: Literal["sgd", "adamw"] = "sgd",
    ) -> History:
        """`training.fit` with a learning rate that falls from ``lr`` to 0 as a cosine: in place, ends in eval mode.

        For other batches than those of `fit_pairs` and `fit_retained`.

        Args:
            model: Changed in place.
            label: Names the progress.
            epochs: Passes.
            steps: Batches of a pass; their mean, where passes differ.
            batches: Epoch number -> its batches; an epoch without any ends the training.
            loss: Model and batch -> scalar loss.
            lr: Learning rate at the start.
            momentum: Of SGD.
            weight_decay: Of the optimizer.
            optimizer: SGD, as for nearly every method, or AdamW.
        """
        stepping: torch.optim.Optimizer
        if optimizer == "adamw":
            stepping = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
        else:
            stepping = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
        return fit(
            model,
            Duration(epochs, math.ceil(steps)),
            batches=lambda epoch, first: itertools.islice(batches(epoch), first, None),
            loss=loss,
            optimizer=stepping,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(stepping, round(epochs * steps)),
            label=label,
            execution=self.execution.unshared,
        )

    def gradients(self, model: nn.Module, index: Tensor, reduction: str = "mean") -> Iterator[dict[str, Tensor]]:
        """Parameter name -> gradient of the cross-entropy in eval mode, for each batch of the positions ``index``."""
        parameters = dict(model.named_parameters())
        model.eval()
        for positions, x in self.split.pass_over(index, self.batch, self.device):
            labels = self.split.labels[positions].to(x.device)
            loss = functional.cross_entropy(model(x), labels, reduction=reduction)
            found = torch.autograd.grad(loss, list(parameters.values()))
            yield dict(zip(parameters, found, strict=True))


def summed(gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of `Task.gradients`, parameter by parameter."""
    total: dict[str, Tensor] = {}
    for gradient in gradients:
        for key, value in gradient.items():
            total[key] = total[key].add_(value) if key in total else value.clone()
    return total


def together(model: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
    """Logits of several batches in one pass, so that batch norm sees the mixture that the loss is taken on."""
    x = torch.cat(parts).contiguous(memory_format=torch.channels_last)
    return model(x).split([len(part) for part in parts])  # type: ignore[no-any-return]


def teacher(model: nn.Module) -> nn.Module:
    """A frozen copy in eval mode: dropout off, batch-norm statistics fixed, no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def divergence(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Distillation loss T^2 KL(softmax(target / T) || softmax(student / T)), summed over classes, mean over samples.

    Source: Hinton et al., 2015, arXiv:1503.02531. (The mean over classes as well, an easy slip with
    ``functional.kl_div``, would divide it by K.)

    Args:
        student: (B, K) logits that learn.
        target: (B, K) logits of the teacher; -inf gives a class no mass.
        temperature: T > 0.
    """
    p = (target / temperature).softmax(1)
    log_q = (student / temperature).log_softmax(1)
    return temperature**2 * functional.kl_div(log_q, p, reduction="batchmean")


def hold_statistics(model: nn.Module) -> None:
    """Put the batch-norm layers in eval mode: a training on forgotten images alone must not make them the norm."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
