"""Stage 4: Fragment-Align, the short finetuning on perturbed forgotten and retained data (MeGU, arXiv:2602.17088)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.config import FinetuneConfig
from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.execution.runtime import generator
from megu_cli.method.adversary import Adversary
from megu_cli.method.discriminant import thumbnails
from megu_cli.method.distillation import Distillation
from megu_cli.models.features import buffers_restored, following, penultimate
from megu_cli.training import Duration, History, cut, fit, shuffled


@dataclass(frozen=True)
class GroupedNoise:
    """Noises for the forgotten samples.

    Attributes:
        values: (G, R, C, H, W), R noises for each of G groups.
        group: (N_f,) the group of each forgotten sample.
    """

    values: Tensor
    group: Tensor


@dataclass(frozen=True)
class Forgotten:
    """D_f in the finetuning: N_f samples in the order of ``index``.

    Attributes:
        index: (N_f,) positions in the split.
        target: (N_f, K) distributions to learn: one-hot perturbing labels, or soft ones.
        log_prior: (N_f, K) term added to the log-probabilities when labels are reassigned; -inf where no label may go.
        noises: The noises that are added to the images: N+ and N-, if they are in use, in this order.
    """

    index: Tensor
    target: Tensor
    log_prior: Tensor
    noises: Sequence[GroupedNoise] = ()


@dataclass(frozen=True)
class Step:
    """A step's samples: B retained ones, and B_f forgotten ones with noise; and the weights of their losses.

    Attributes:
        plain_number: Forgotten samples without noise in the whole step, of which this may be a slice.
        slices: In how many slices the step is computed.
    """

    retained: Tensor
    retained_labels: Tensor
    forgotten: Tensor
    forgotten_labels: Tensor
    target: Tensor
    log_prior: Tensor
    clean: Tensor
    retained_weight: float
    forgotten_weight: float
    plain_number: int
    slices: int

    @property
    def images(self) -> Tensor:
        """(B + B_f, C, H, W), the retained ones first."""
        return torch.cat([self.retained, self.forgotten]).contiguous(memory_format=torch.channels_last)

    @property
    def labels(self) -> Tensor:
        """(B + B_f,) true labels."""
        return torch.cat([self.retained_labels, self.forgotten_labels])

    @property
    def plain(self) -> Tensor:
        """(B + B_f,) bool: the samples without noise."""
        return torch.cat([torch.ones_like(self.retained_labels, dtype=torch.bool), self.clean])

    def cut(self) -> list[Step]:
        """The slices; their losses add up to that of the step. One may have no retained, or no forgotten samples."""
        if self.slices == 1:
            return [self]
        retained, forgotten = len(self.retained), len(self.forgotten)
        return [
            replace(
                self,
                retained=self.retained[r],
                retained_labels=self.retained_labels[r],
                forgotten=self.forgotten[f],
                forgotten_labels=self.forgotten_labels[f],
                target=self.target[f],
                log_prior=self.log_prior[f],
                clean=self.clean[f],
                retained_weight=self.retained_weight * (r.stop - r.start) / retained,
                forgotten_weight=self.forgotten_weight * (f.stop - f.start) / forgotten,
            )
            for r, f in zip(cut(retained, self.slices), cut(forgotten, self.slices), strict=True)
        ]


def finetune(
    model: nn.Module,
    split: Split,
    retain: Tensor,
    forgotten: Forgotten,
    settings: FinetuneConfig,
    *,
    retain_samples: int,
    forget_batch: int,
    weight: float,
    uniform: bool = True,
    without_images: Tensor | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    execution: Execution = LOCAL,
) -> History:
    """Finetune ``model`` in place on D_f^p and D_r.

    Every step sees ``settings.batch`` retained samples (x, y) and ``forget_batch`` forgotten ones (x + u (N+ + N-),
    target). Its loss is CE(retained) + weight * CE(forgotten) + adversary * Adversary.loss(clean forgotten), and where
    outputs have no images, + distillation * Distillation.loss(retained). Beyond the paper: the clean samples, the
    reassigned labels, the adversary, and the distillation.

    Args:
        model: Starts as the original model, on the device.
        split: The images.
        retain: (N_r,) positions of D_r.
        forgotten: D_f with its labels and noises.
        settings: The section ``finetune`` of the config. The next three arguments are the values of the settings that
            may be ``auto``. With ``max_steps``, the learning rate reaches 0 at the last step.
        retain_samples: Retained samples per epoch.
        forget_batch: Forgotten samples per step.
        weight: Weight of the loss on forgotten samples.
        uniform: Noise strength u ~ U(0, 1) per sample and epoch, rather than 1.
        without_images: (K,) bool, outputs without images that are to stay where they are; ``None``: there are none.
        validate: Model -> accuracy on retained validation samples, after each epoch.
        execution: Device, seed of all draws, processes (each takes its part of every batch), progress, resume point.
    """
    duration = Duration(
        settings.epochs, math.ceil(retain_samples / settings.batch), settings.max_steps, settings.patience
    )
    assert settings.lr != "auto"  # the caller chooses
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, duration.total)
    classes = forgotten.target.shape[1]
    against = Adversary(split.labels[retain].unique(), classes, execution) if settings.adversary else None
    steady: Distillation | None = None
    if settings.distillation and without_images is not None and without_images.any():
        steady = Distillation(model, without_images)
    draws = _Draws(split, retain, forgotten, settings, retain_samples, forget_batch, uniform, execution)

    def loss(net: nn.Module, step: Step) -> Tensor:
        # One pass over both parts: batch norm sees the mixture that the loss is taken on.
        together = step.images
        features.clear()
        logits = net(together)
        kept, gone = logits.split([len(step.retained), len(step.forgotten)])
        target = reassigned(gone.detach(), step) if settings.reassign else step.target
        retained = _cross_entropy(kept, step.retained_labels) * step.retained_weight
        value = retained + weight * _cross_entropy(gone, target.to(gone.dtype)) * step.forgotten_weight
        if steady:
            value = value + settings.distillation * steady.loss(step.retained, kept) * step.retained_weight
        if against:
            # Noised samples lie elsewhere: the adversary must fail on the clean ones.
            plain = step.plain
            seen = features[-1][plain]
            if step.slices == 1:
                against.see(thumbnails(together[plain]), seen.detach(), step.labels[plain])
            value = value + settings.adversary * against.loss(seen[len(step.retained) :], step.plain_number)
        return value

    def slices(step: Step) -> list[Step]:
        parts = step.cut()
        if against and len(parts) > 1:
            # The adversary sees the whole step before it judges a slice: one more pass, without gradients.
            rows = []
            with torch.no_grad(), buffers_restored(model):
                for part in parts:
                    together, plain = part.images, part.plain
                    features.clear()
                    model(together)
                    rows.append((thumbnails(together[plain]), features[-1][plain], part.labels[plain]))
            against.see(*map(torch.cat, zip(*rows, strict=True)))
        return parts

    hidden: contextlib.AbstractContextManager[list[Tensor]] = (
        penultimate(model, classes, attached=True) if against else contextlib.nullcontext([])
    )
    with following(model), hidden as features:
        return fit(
            model,
            duration,
            batches=draws.batches,
            loss=loss,
            optimizer=optimizer,
            scheduler=scheduler,
            label="finetune",
            slices=slices,
            validate=validate,
            memory=against.memory if against else {},
            execution=execution,
        )


@dataclass(frozen=True)
class _Draws:
    """The steps of each epoch: which samples, which noises, and how strong.

    Attributes:
        split: The images.
        retain: (N_r,) positions of D_r.
        forgotten: D_f.
        settings: The section ``finetune`` of the config.
        retain_samples: Retained samples per epoch.
        forget_batch: Forgotten samples per step.
        uniform: Noise strength from U(0, 1) rather than 1.
        execution: Device, seed and processes.
    """

    split: Split
    retain: Tensor
    forgotten: Forgotten
    settings: FinetuneConfig
    retain_samples: int
    forget_batch: int
    uniform: bool
    execution: Execution

    def batches(self, epoch: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from step ``first`` on."""
        split, forgotten, device = self.split, self.forgotten, self.execution.device
        processes, seed, batch = self.execution.processes, self.execution.seed, self.settings.batch
        retained = shuffled(self.retain, self.retain_samples, batch, seed, "finetune", epoch, "retain")
        size = math.ceil(self.retain_samples / batch) * self.forget_batch
        slots = torch.arange(len(forgotten.index))
        chosen = shuffled(slots, size, self.forget_batch, seed, "finetune", epoch, "forget")
        draw = generator(seed, "finetune", epoch, "noise")
        noisy = (
            torch.rand(size, generator=draw) >= self.settings.clean
            if forgotten.noises
            else torch.zeros(size, dtype=torch.bool)
        )
        strength = torch.rand(size, generator=draw) if self.uniform else torch.ones(size)
        strengths = (strength * noisy).split(self.forget_batch)
        picks = [
            torch.randint(noise.values.shape[1], (size,), generator=draw).split(self.forget_batch)
            for noise in forgotten.noises
        ]
        values = [noise.values.to(device) for noise in forgotten.noises]
        pairs = list(zip(retained, chosen, strict=True))[first:]
        parts = [(processes.slice(len(r)), processes.slice(len(s))) for r, s in pairs]
        shares = [(r[kept], s[gone]) for (r, s), (kept, gone) in zip(pairs, parts, strict=True)]
        images = split.batches([i for r, s in shares for i in (r, forgotten.index[s])], device)
        for step, ((r, s), (_, gone)) in enumerate(zip(shares, parts, strict=True), first):
            x, x_forgotten = next(images), next(images)
            numbers, clean = [len(part) for part in pairs[step - first]], strengths[step][gone] == 0
            for value, noise, pick in zip(values, forgotten.noises, picks, strict=True):
                u = strengths[step][gone].to(device)[:, None, None, None]
                x_forgotten = x_forgotten + u * value[noise.group[s], pick[step][gone]]
            yield Step(
                x,
                split.labels[r].to(device),
                x_forgotten,
                split.labels[forgotten.index[s]].to(device),
                forgotten.target[s].to(device),
                forgotten.log_prior[s].to(device),
                clean.to(device),
                processes.weight(numbers[0]),
                processes.weight(numbers[1]),
                int(clean.sum()),
                processes.slices(max(numbers), self.settings.accumulate),
            )


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean; 0 for no samples."""
    return functional.cross_entropy(logits, target) if len(logits) else logits.sum()


def reassigned(logits: Tensor, step: Step) -> Tensor:
    """(B_f, K) targets: of clean samples, the label argmax_k of log p_now(k|x) + log prior(k)."""
    now = functional.log_softmax(logits.double(), 1) + step.log_prior
    moved = functional.one_hot(now.argmax(1), logits.shape[1]).to(step.target)
    return torch.where(step.clean[:, None], moved, step.target)
