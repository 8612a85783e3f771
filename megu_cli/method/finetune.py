"""Stage 4: Fragment-Align, the short finetuning on perturbed forgotten and retained data (MeGU, arXiv:2602.17088)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.data import Split
from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.execution.runtime import Track, generator, silent
from megu_cli.method.adversary import Adversary
from megu_cli.models.features import following, penultimate
from megu_cli.training import Checkpoints, History, fit, shuffled


@dataclass(frozen=True)
class Forgotten:
    """D_f as the finetuning sees it: N_f samples in the order of ``index``.

    Attributes:
        index: (N_f,) positions in the split.
        target: (N_f, K) distributions to learn: one-hot perturbing labels, or soft ones.
        log_prior: (N_f, K) what is added to the log-probabilities where labels are reassigned; -inf where no label
            may go.
        positive: (N_f,) which group of the positive noises a sample takes.
        negative: (N_f,) which group of the negative noises a sample takes.
    """

    index: Tensor
    target: Tensor
    log_prior: Tensor
    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Step:
    """A step's samples: B retained and B_f forgotten ones, these with noise, and the weights of their losses."""

    retained: Tensor
    retained_labels: Tensor
    forgotten: Tensor
    forgotten_labels: Tensor
    target: Tensor
    log_prior: Tensor
    clean: Tensor
    retained_weight: float
    forgotten_weight: float


def finetune(
    model: nn.Module,
    split: Split,
    retain: Tensor,
    forgotten: Forgotten,
    *,
    positive: Tensor | None,
    negative: Tensor | None,
    uniform: bool,
    clean: float,
    reassign: bool,
    weight: float,
    adversary: float,
    epochs: int,
    retain_samples: int,
    batch: int,
    forget_batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: int,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    max_steps: int | None = None,
    checkpoints: Checkpoints | None = None,
    device: torch.device | str = "cpu",
    crew: Processes = SINGLE,
    track: Track = silent,
) -> History:
    """Finetune ``model`` in place on D_f^p and D_r.

    Every step sees ``batch`` retained samples (x, y) and ``forget_batch`` forgotten ones (x + u (N+ + N-), target);
    its loss is CE(retained) + weight * CE(forgotten) + adversary * Adversary.loss(clean forgotten). Beyond the paper:
    the clean samples, the labels that are reassigned, and the adversary.

    Args:
        model: Starts as the original model, on ``device``.
        split: Where the samples are.
        retain: (N_r,) positions of D_r.
        forgotten: D_f with its labels.
        positive: (G, R, C, H, W) noises N+, or none.
        negative: (G, R, C, H, W) noises N-, or none.
        uniform: Noise strength u ~ U(0, 1) per sample and epoch, rather than 1.
        clean: Share of the forgotten samples left without noise.
        reassign: On clean samples, the label is argmax_k of log p_now(k|x) + log_prior(k), taken anew at every step
            from the model as it is; noised samples keep their given target.
        weight: Of the loss on forgotten samples.
        adversary: Weight of `Adversary.loss`.
        epochs: Passes; each draws samples, noises and strengths anew.
        retain_samples: Retained samples per epoch.
        batch: Retained samples per step.
        forget_batch: Forgotten samples per step.
        lr: SGD learning rate at the start; it follows a cosine to 0.
        momentum: Of SGD.
        weight_decay: Of SGD.
        seed: Of all draws.
        validate: Model -> accuracy on retained validation samples, after each epoch.
        patience: Epochs without a gain in it after which to stop.
        max_steps: Optimiser steps at most: what is beyond them in the last epoch is left out, and the learning rate
            reaches 0 at the last step.
        checkpoints: See `training.fit`.
        device: Where to compute.
        crew: The processes that share the work: each takes its part of every batch.
        track: Reports progress.
    """
    steps = math.ceil(retain_samples / batch)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    total = min(epochs * steps, max_steps or epochs * steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    noises = [(n.to(device), groups) for n, groups in
              ((positive, forgotten.positive), (negative, forgotten.negative)) if n is not None]  # fmt: skip
    slots = torch.arange(len(forgotten.index))
    classes = forgotten.target.shape[1]
    against = Adversary(split.labels[retain].unique(), classes, device, crew) if adversary else None

    def batches(epoch: int, first: int) -> Iterator[Step]:
        retained = shuffled(retain, retain_samples, batch, seed, "finetune", epoch, "retain")
        chosen = shuffled(slots, steps * forget_batch, forget_batch, seed, "finetune", epoch, "forget")
        draw = generator(seed, "finetune", epoch, "noise")
        size = steps * forget_batch
        noisy = torch.rand(size, generator=draw) >= clean if noises else torch.zeros(size, dtype=torch.bool)
        strength = torch.rand(size, generator=draw) if uniform else torch.ones(size)
        strength = (strength * noisy).split(forget_batch)
        picks = [torch.randint(n.shape[1], (size,), generator=draw).split(forget_batch) for n, _ in noises]
        pairs = list(zip(retained, chosen, strict=True))[first:]
        parts = [(crew.slice(len(r)), crew.slice(len(s))) for r, s in pairs]
        own = [(r[kept], s[gone]) for (r, s), (kept, gone) in zip(pairs, parts, strict=True)]
        images = split.batches([i for r, s in own for i in (r, forgotten.index[s])], device)
        for step, ((r, s), (_, gone)) in enumerate(zip(own, parts, strict=True), first):
            x, x_forgotten = next(images), next(images)
            for (noise, groups), pick in zip(noises, picks, strict=True):
                u = strength[step][gone].to(device)[:, None, None, None]
                x_forgotten = x_forgotten + u * noise[groups[s], pick[step][gone]]
            yield Step(
                x,
                split.labels[r].to(device),
                x_forgotten,
                split.labels[forgotten.index[s]].to(device),
                forgotten.target[s].to(device),
                forgotten.log_prior[s].to(device),
                (strength[step][gone] == 0).to(device),
                crew.weight(len(pairs[step - first][0])),
                crew.weight(len(pairs[step - first][1])),
            )

    def loss(net: nn.Module, step: Step) -> Tensor:
        # One pass over both parts: batch norm sees the mixture that the loss is taken on.
        together = torch.cat([step.retained, step.forgotten]).contiguous(memory_format=torch.channels_last)
        features.clear()
        logits = net(together)
        kept, gone = logits.split([len(step.retained), len(step.forgotten)])
        target = reassigned(gone.detach(), step) if reassign else step.target
        retained = functional.cross_entropy(kept, step.retained_labels) * step.retained_weight
        value = retained + weight * functional.cross_entropy(gone, target.to(gone.dtype)) * step.forgotten_weight
        if against:
            # Noised samples lie elsewhere; it is the clean ones that are to be found no more.
            plain = torch.cat([torch.ones_like(step.retained_labels, dtype=torch.bool), step.clean])
            labels = torch.cat([step.retained_labels, step.forgotten_labels])[plain]
            value = value + adversary * against.loss(together[plain], features[-1][plain], labels, len(step.retained))
        return value

    hidden: contextlib.AbstractContextManager[list[Tensor]] = (
        penultimate(model, classes, attached=True) if against else contextlib.nullcontext([])
    )
    with following(model), hidden as features:
        return fit(
            model,
            epochs=epochs,
            steps=steps,
            batches=batches,
            loss=loss,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
            label="finetune",
            validate=validate,
            patience=patience,
            limit=max_steps,
            memory=against.memory if against else {},
            checkpoints=checkpoints,
            crew=crew,
            track=track,
        )


def reassigned(logits: Tensor, step: Step) -> Tensor:
    """(B_f, K) targets: of clean samples, the label argmax_k of log p_now(k|x) + log prior(k)."""
    now = functional.log_softmax(logits.double(), 1) + step.log_prior
    moved = functional.one_hot(now.argmax(1), logits.shape[1]).to(step.target)
    return torch.where(step.clean[:, None], moved, step.target)
