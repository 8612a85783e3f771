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
from megu_cli.models import Features, penultimate
from megu_cli.processes import ALONE, Crew
from megu_cli.runtime import Track, generator, silent
from megu_cli.training import Checkpoints, History, fit, shuffled

# `own_features` at most.
_FARTHEST = 10


@dataclass(frozen=True)
class Forgotten:
    """D_f as the finetuning sees it: N_f samples in the order of ``index``.

    Attributes:
        index: (N_f,) positions in the split.
        target: (N_f, K) distributions to learn: one-hot perturbing labels, or soft ones.
        prior: (N_f, K) log of each sample's row of the transition matrix, -inf where no label may go; used where
            labels are reassigned.
        positive: (N_f,) which group of the positive noises a sample takes.
        negative: (N_f,) which group of the negative noises a sample takes.
    """

    index: Tensor
    target: Tensor
    prior: Tensor
    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class _Step:
    retained: Tensor
    retained_labels: Tensor
    forgotten: Tensor
    target: Tensor
    prior: Tensor
    clean: Tensor
    left: float
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
    beta: float,
    weight: float,
    align: float,
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
    crew: Crew = ALONE,
    track: Track = silent,
) -> History:
    """Finetune ``model`` in place on D_f^p and D_r.

    Every step sees ``batch`` retained samples (x, y) and ``forget_batch`` forgotten ones (x + u (N+ + N-), target);
    its loss is CE(retained) + weight * CE(forgotten) + align * own_features(forgotten), the last fading out linearly.

    Args:
        model: Starts as the original model, on ``device``.
        split: Where the samples are.
        retain: (N_r,) positions of D_r.
        forgotten: D_f with its labels.
        positive: (G, R, C, H, W) noises N+, or none.
        negative: (G, R, C, H, W) noises N-, or none.
        uniform: Noise strength u ~ U(0, 1) per sample and epoch, rather than 1.
        clean: Share of the forgotten samples left without noise.
        reassign: On clean samples, the label is argmax_k of log p_now(k|x) + beta * prior(k), taken anew at every
            step from the model as it is; noised samples keep their given target.
        beta: Weight of the prior.
        weight: Of the loss on forgotten samples.
        align: Of `own_features` at the first step; it falls to 0 at the last, so that behaviour settles after depth.
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
    stay = split.labels[retain].unique().to(device)  # the classes that the classifier keeps

    def batches(epoch: int, first: int) -> Iterator[_Step]:
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
            yield _Step(
                x,
                split.labels[r].to(device),
                x_forgotten,
                forgotten.target[s].to(device),
                forgotten.prior[s].to(device),
                (strength[step][gone] == 0).to(device),
                1 - (epoch * steps + step) / total,
                crew.weight(len(pairs[step - first][0])),
                crew.weight(len(pairs[step - first][1])),
            )

    def loss(net: nn.Module, step: _Step) -> Tensor:
        # One pass over both parts: batch norm sees the mixture that the loss is taken on.
        together = torch.cat([step.retained, step.forgotten]).contiguous(memory_format=torch.channels_last)
        features.clear()
        logits = net(together)
        kept, gone = logits.split([len(step.retained), len(step.forgotten)])
        target = step.target
        if reassign:
            now = functional.log_softmax(gone.detach().double(), 1) + beta * step.prior
            now = now.masked_fill(step.prior.isneginf(), float("-inf"))  # with beta = 0, too, no label goes there
            moved = functional.one_hot(now.argmax(1), gone.shape[1]).to(target)
            target = torch.where(step.clean[:, None], moved, target)
        retained = functional.cross_entropy(kept, step.retained_labels) * step.retained_weight
        value = retained + weight * functional.cross_entropy(gone, target.to(gone.dtype)) * step.forgotten_weight
        if align:
            seen, own = features[-1].float().split([len(step.retained), len(step.forgotten)])
            value = value + align * step.left * own_features(
                seen.detach(),
                step.retained_labels,
                own,
                target.argmax(1),
                features.head.weight.detach().flatten(1)[stay],
                classes,
                crew,
            )
        return value

    hidden: contextlib.AbstractContextManager[Features] = (
        penultimate(model, classes, attached=True) if align else contextlib.nullcontext(Features())
    )
    with hidden as features:
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
            checkpoints=checkpoints,
            crew=crew,
            track=track,
        )


def own_features(
    retained: Tensor,
    retained_labels: Tensor,
    forgotten: Tensor,
    labels: Tensor,
    weight: Tensor,
    classes: int,
    crew: Crew = ALONE,
) -> Tensor:
    """How far forgotten samples lie from the retained ones of their label in features that no retained logit uses.

    A step along the rows of the retained classes' weights changes what the classifier says; behaviour lives there, and
    the cross-entropies see to it. What is orthogonal to their differences is the target's own: with z the projection
    of the features on it, d the mean of ||z - mean z of the retained samples of its label||^2 over forgotten samples,
    and s the same over the retained ones, this is d / (s + d / 10), d in the denominator without gradient: d / s, but
    never more than 10, where retained features hardly vary. Not in the paper; see docs/decisions.md.

    Args:
        retained: (B, D) features of the retained samples of a batch, without gradient.
        retained_labels: (B,).
        forgotten: (B_f, D) features of the forgotten samples.
        labels: (B_f,) what they are trained on; one without a retained sample in the batch does not count.
        weight: (M, D) of the classifier, its retained classes alone.
        classes: Number of classes K.
        crew: The processes that share the batch.

    Returns:
        A scalar; 0 where the retained classes use all features (M > D).
    """
    if len(weight) > weight.shape[1]:
        return forgotten.sum() * 0
    used = torch.linalg.qr((weight - weight.mean(0)).T.float())[0][:, : len(weight) - 1]
    kept, gone = (x - (x @ used) @ used.T for x in (retained, forgotten))
    member = functional.one_hot(retained_labels, classes).to(kept)
    number = crew.mean(member.sum(0))
    mean = crew.mean(member.T @ kept) / number.clamp(min=1e-12)[:, None]
    spread = crew.mean((kept - mean[retained_labels]).square().sum()) / number.sum()
    there = (number > 0)[labels].to(gone)
    counted = crew.mean(there.sum()).clamp(min=1e-12)
    distance = ((gone - mean[labels]).square().sum(1) * there).sum() / counted
    result: Tensor = distance / (spread + crew.mean(distance.detach()) / _FARTHEST).clamp(min=1e-12)
    return result
