"""Linear discriminant analysis of samples that come in batches: a classifier in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megu_cli.execution import LOCAL, Execution

# What a step counts of the one after it in the share that is found; how little is left of a class that was seen long
# ago; height and width of a thumbnail.
_LATELY, _SEEN, _THUMBNAIL = 0.9, 0.01, 8


def thumbnails(images: Tensor) -> Tensor:
    """(B, C * 64): images (B, C, H, W) at 8x8 pixels, by area, as rows."""
    return functional.adaptive_avg_pool2d(images, _THUMBNAIL).flatten(1)


class Discriminant:
    """Linear discriminant analysis of samples that come step by step, and what share of the forgotten it finds.

    Sums and differences of large numbers: all in float64, and on the CPU where the device has none.

    Args:
        memory: Where it keeps its sums, for `training.fit`.
        name: Of this one there.
        stay: (M,) the retained classes.
        classes: Number of classes K.
        fade: What a step counts of the one after it.
        execution: Device of the samples, and the processes that share the batches.
    """

    def __init__(
        self,
        memory: dict[str, Tensor],
        name: str,
        stay: Tensor,
        classes: int,
        fade: float,
        execution: Execution = LOCAL,
    ) -> None:
        device = torch.device(execution.device)
        self.device = torch.device("cpu") if device.type == "mps" else device
        self._memory, self._name, self._stay, self._classes = memory, name, stay.to(self.device), classes
        self._fade, self._processes = fade, execution.processes
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
        latest = {key: self._processes.mean(value) * self._processes.world for key, value in latest.items()}
        found = x.new_ones(())
        if self._name_of("found") in self._memory:
            gone = ~torch.isin(labels, self._stay)
            hits = self._processes.mean((self._apart(x[gone]) > 0).sum().to(x))
            there = self._processes.mean(gone.sum().to(x))
            share = torch.where(there > 0, hits / there.clamp(min=1e-12), self.found)
            found = _LATELY * self.found + (1 - _LATELY) * share
            latest = {key: value + self._fade * self._kept(key) for key, value in latest.items()}
        self._memory.update({self._name_of(key): value for key, value in {**latest, "found": found}.items()})
        self._rule = None

    def loss(self, features: Tensor, number: int | None = None) -> Tensor:
        """How surely forgotten samples are found, the mean over their features (B_f, D).

        Args:
            features: (B_f, D).
            number: B_f; where the features are those of a slice of the forgotten samples, how many they all are, so
                that the slices' losses add up to the mean.

        With l = -log p(retained | z) it is l / (1 + l), of which the denominator has no gradient: where features were
        learned by heart, l is of the order of a squared distance in units of a very small spread.
        """
        kept, gone = self._scores(features.to(self.device).double())
        value = functional.softplus(gone.logsumexp(1) - kept.logsumexp(1))
        # The processes have different numbers of samples; their average is the mean over all.
        of_process = float(len(features) if number is None else number)
        count = self._processes.mean(value.new_tensor(of_process)).clamp(min=1e-12)
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
        axes, offset, kept = self._solution()
        scores = features @ axes - offset
        return scores.masked_fill(~kept, -torch.inf), scores.masked_fill(kept, -torch.inf)

    def _solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """`_solved`, once for what was seen so far."""
        if self._rule is None:
            self._rule = self._solved()
        return self._rule

    def _solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """S^-1 m (D, C), m' S^-1 m / 2 (C,), and which of the C classes are retained (C,)."""
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
