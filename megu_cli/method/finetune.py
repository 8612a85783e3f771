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
from megu_cli.models import following, penultimate
from megu_cli.processes import ALONE, Crew
from megu_cli.runtime import Track, generator, silent
from megu_cli.training import Checkpoints, History, fit, shuffled

# Of the discriminants: what a step counts of the one after it while features change, and in the share that is found;
# how little is left of a class that was seen long ago; height and width of a thumbnail.
_LATELY, _SEEN, _THUMBNAIL = 0.9, 0.01, 8


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
    forgotten_labels: Tensor
    target: Tensor
    prior: Tensor
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
    beta: float,
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
    crew: Crew = ALONE,
    track: Track = silent,
) -> History:
    """Finetune ``model`` in place on D_f^p and D_r.

    Every step sees ``batch`` retained samples (x, y) and ``forget_batch`` forgotten ones (x + u (N+ + N-), target);
    its loss is CE(retained) + weight * CE(forgotten) + adversary * Discriminant.loss(clean forgotten). The last stands
    while the features find more of the forgotten than thumbnails of the images do: what can be told apart by its looks
    is told apart by a model that never saw it, too.

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
        adversary: Weight of `Discriminant.loss`.
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
    memory: dict[str, Tensor] = {}
    stay = split.labels[retain].unique()
    by_features = Discriminant(memory, "features", stay, classes, _LATELY, device, crew)
    by_looks = Discriminant(memory, "looks", stay, classes, 1, device, crew)

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
                split.labels[forgotten.index[s]].to(device),
                forgotten.target[s].to(device),
                forgotten.prior[s].to(device),
                (strength[step][gone] == 0).to(device),
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
        if adversary:
            # Noised samples lie elsewhere; it is the clean ones that are to be found no more.
            plain = torch.cat([torch.ones_like(step.retained_labels, dtype=torch.bool), step.clean])
            labels = torch.cat([step.retained_labels, step.forgotten_labels])[plain]
            looks = functional.adaptive_avg_pool2d(together[plain].to(by_looks.device), _THUMBNAIL)
            by_looks.see(looks.flatten(1), labels)
            seen = features[-1][plain]
            by_features.see(seen.detach(), labels)
            # What is told apart by its looks is told apart by a model that never saw it, too.
            told_apart = (by_features.found > by_looks.found).to(value)
            value = value + adversary * told_apart * by_features.loss(seen[len(step.retained) :])
        return value

    hidden: contextlib.AbstractContextManager[list[Tensor]] = (
        penultimate(model, classes, attached=True) if adversary else contextlib.nullcontext([])
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
            memory=memory,
            checkpoints=checkpoints,
            crew=crew,
            track=track,
        )


class Discriminant:
    """Linear discriminant analysis of samples that come step by step, and what share of the forgotten it finds.

    The adversary of Fragment-Align: what the cross-entropies reach is what the classifier says; beside it the features
    keep the forgotten class, and a linear probe finds it. So the forgotten are trained against such a probe, as domains
    are made alike in domain-adversarial training (Ganin et al. 2016), with a discriminant in closed form in place of a
    second network. Not in the paper; see docs/decisions.md.

    Sums and differences of large numbers: all in float64, and on the CPU where the device has none.

    Args:
        memory: Where it keeps its sums, for `training.fit`.
        name: Of this one there.
        stay: (M,) the retained classes.
        classes: Number of classes K.
        fade: What a step counts of the one after it.
        device: Where the samples are.
        crew: The processes that share the batches.
    """

    def __init__(
        self,
        memory: dict[str, Tensor],
        name: str,
        stay: Tensor,
        classes: int,
        fade: float,
        device: torch.device | str = "cpu",
        crew: Crew = ALONE,
    ) -> None:
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self._memory, self._name, self._stay, self._classes = memory, name, stay.to(self.device), classes
        self._fade, self._crew = fade, crew
        self._rule: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def found(self) -> Tensor:
        """Share of the forgotten samples of late, judged before they were taken in, that went to a forgotten class.

        1 before there were any.
        """
        return self._kept("found")

    def see(self, features: Tensor, labels: Tensor) -> None:
        """Take in a step's features (B, D), without gradient, and their true labels (B,)."""
        x, labels = features.to(self.device).double(), labels.to(self.device)
        latest = {
            "number": torch.bincount(labels, minlength=self._classes).to(x),
            "sum": x.new_zeros(self._classes, x.shape[1]).index_add_(0, labels, x),
            "outer": x.T @ x,
        }
        latest = {key: self._crew.mean(value) * self._crew.world for key, value in latest.items()}
        found = x.new_ones(())
        if self._name_of("found") in self._memory:
            gone = ~torch.isin(labels, self._stay)
            hits = self._crew.mean((self._apart(x[gone]) > 0).sum().to(x))
            there = self._crew.mean(gone.sum().to(x))
            share = torch.where(there > 0, hits / there.clamp(min=1e-12), self.found)
            found = _LATELY * self.found + (1 - _LATELY) * share
            latest = {key: value + self._fade * self._kept(key) for key, value in latest.items()}
        self._memory.update({self._name_of(key): value for key, value in {**latest, "found": found}.items()})
        self._rule = None

    def loss(self, features: Tensor) -> Tensor:
        """How surely forgotten samples are found, the mean over their features (B_f, D).

        With l = -log p(retained | z) it is l / (1 + l), of which the denominator has no gradient: where features were
        learned by heart, l is of the order of a squared distance in units of a very small spread.
        """
        kept, gone = self._scores(features.to(self.device).double())
        value = functional.softplus(gone.logsumexp(1) - kept.logsumexp(1))
        # The processes have different numbers of samples; their average is the mean over all.
        count = self._crew.mean(value.new_tensor(float(len(features)))).clamp(min=1e-12)
        return ((value / (1 + value.detach())).sum() / count).to(features)

    def _apart(self, features: Tensor) -> Tensor:
        """(B,) by how much the best forgotten class is ahead of the best retained one."""
        kept, gone = self._scores(features)
        return gone.max(1).values - kept.max(1).values

    def _scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) scores of the C classes seen of late, twice: -inf but for the retained, and but for the forgotten.

        z' S^-1 m_k - m_k' S^-1 m_k / 2 is log p(k | z) but for a constant, if classes k are equally frequent, and
        normally distributed with means m_k and a common covariance S.
        """
        if self._rule is None:
            self._rule = self._solved()
        axes, offset, kept = self._rule
        scores = features @ axes - offset
        return scores.masked_fill(~kept, -torch.inf), scores.masked_fill(kept, -torch.inf)

    def _solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """S^-1 m (D, C), m' S^-1 m / 2 (C,) and which of the C classes are retained (C,)."""
        number, total, outer = self._kept("number"), self._kept("sum"), self._kept("outer")
        within = outer - (total / number.clamp(min=1e-12)[:, None]).T @ total
        n, d = (number - 1).clamp(min=0).sum().clamp(min=1), len(within)
        within = within / n
        # Oracle approximating shrinkage (Chen et al. 2010): to the mean variance in all directions, the more the fewer
        # samples there are.
        trace, square = within.trace(), within.square().sum()
        rest = (n + 1 - 2 / d) * (square - trace.square() / d)
        shrinkage = (((1 - 2 / d) * square + trace.square()) / rest.clamp(min=1e-300)).clamp(max=1)
        within = (1 - shrinkage) * within
        within.diagonal().add_(shrinkage * trace / d + 1e-12)
        there = torch.where(number > _SEEN)[0]
        mean = total[there] / number[there, None]
        axes = torch.linalg.solve(within, mean.T)
        return axes, (mean.T * axes).sum(0) / 2, torch.isin(there, self._stay)

    def _name_of(self, key: str) -> str:
        return f"{self._name} {key}"

    def _kept(self, key: str) -> Tensor:
        return self._memory[self._name_of(key)].to(self.device)  # from a checkpoint, perhaps
