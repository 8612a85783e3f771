"""The unlearning problem: data, request, settings and execution, and the values of the settings that are ``auto``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megu_cli.config import FinetuneConfig, LabelsConfig, NoiseConfig, TransitionConfig
from megu_cli.data import Dataset
from megu_cli.execution import LOCAL, Execution
from megu_cli.request.resolve import Request

# Sizes of the finetuning where they are ``auto``: retained samples per epoch, but at most this many passes over D_r, a
# quarter of those that retraining takes by default. Of very few images these are too few steps to forget anything: at
# least so many samples then, in at most so many passes. Passes over D_f in all.
_RETAINED, _PASSES = 12_000, 3.75
_FEWEST, _MOST_PASSES = 4000, 20
_FORGET_PASSES = 3
# Learning rates of the finetuning where it is ``auto``, in the order in which they are tried.
_RATES = (0.02, 0.005, 0.00125)
# Forgotten samples per step at which the loss on single images has the weight 1; it grows with their root.
_BATCH_OF_WEIGHT_ONE = 225


@dataclass(frozen=True)
class UnlearningProblem:
    """What is to be forgotten of which data, and how.

    Attributes:
        data: The data set; only its training split is read.
        request: The forget request, resolved against it.
        transition: Settings of the transition matrix.
        labels: Settings of the perturbing labels.
        noise: Settings of the noise pair.
        finetune: Settings of the finetuning.
        execution: Where and how to compute. The models are on its device. Its processes share noise and finetuning,
            its resume point is that of the finetuning.
    """

    data: Dataset
    request: Request
    transition: TransitionConfig
    labels: LabelsConfig
    noise: NoiseConfig
    finetune: FinetuneConfig
    execution: Execution = LOCAL

    @property
    def true(self) -> Tensor:
        """(N_f,) true labels of D_f."""
        return self.data.train.labels[self.request.forget]

    @property
    def concepts(self) -> Tensor:
        """(N_f,) concepts of D_f."""
        return self.data.train.concepts[self.request.forget]

    @property
    def retain_samples(self) -> int:
        """Retained samples per epoch of the finetuning."""
        settings = self.finetune
        if settings.retain_fraction == "auto":
            images = len(self.request.retain)
            return min(_RETAINED, max(round(_PASSES * images), min(_FEWEST, _MOST_PASSES * images)))
        return max(settings.batch, round(settings.retain_fraction * len(self.request.retain)))

    @property
    def forget_batch(self) -> int:
        """Forgotten samples per step of the finetuning."""
        return self.forget_batch_in(self.finetune.epochs)

    def forget_batch_in(self, epochs: int) -> int:
        """Forgotten samples per step of a training of so many epochs, each as long as one of the finetuning."""
        settings = self.finetune
        if settings.forget_batch != "auto":
            return settings.forget_batch
        # What is shown too often is learned by heart, with its perturbing labels.
        steps = epochs * math.ceil(self.retain_samples / settings.batch)
        return min(64, max(8, math.ceil(_FORGET_PASSES * len(self.request.forget) / steps)))

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of the finetuning; the next one is for a model that the one before has damaged."""
        return _RATES if self.finetune.lr == "auto" else (self.finetune.lr,)

    @property
    def label_mode(self) -> str:
        """How perturbing labels are made: ``proxy``, ``hard``, ``sample``, ``soft`` or ``matched``.

        Where the proxy turns out poor and ``labels.source`` is ``auto``, `perturb` makes them by `plain_label_mode`.
        """
        given = self.labels
        auto = given.source == given.mode == given.keep == "auto"
        return "proxy" if auto or given.source == "proxy" else self.plain_label_mode

    @property
    def plain_label_mode(self) -> str:
        """How perturbing labels are made without the proxy."""
        if self.labels.mode != "auto":
            return self.labels.mode
        return "hard" if self.request.kind == "classes" else "matched"

    def weight(self, mode: str) -> float:
        """Weight of the loss on forgotten samples with labels made by ``mode``."""
        if self.finetune.weight != "auto":
            return self.finetune.weight
        if mode == "proxy" and self.request.kind not in ("classes", "subclasses"):
            # The more forgotten samples a step has, the less noisy is their gradient: weight times noise stays equal.
            return math.sqrt(self.forget_batch / _BATCH_OF_WEIGHT_ONE)
        return 0.1 if mode == "hard" else 0.2

    def noise_use(self, mode: str) -> str:
        """Which noises are trained for labels made by ``mode``: ``both``, ``positive``, ``negative`` or ``none``."""
        if self.noise.use != "auto":
            return self.noise.use
        return "negative" if self.request.kind == "classes" and mode == "hard" else "none"

    def rows(self, matrix: Tensor) -> Tensor:
        """(N_f, K): each forgotten sample's row of the transition matrix."""
        row = torch.full((len(self.data.concepts),), -1)
        row[torch.tensor(self.request.asked)] = torch.arange(len(self.request.asked))
        return matrix[row[self.concepts]]
