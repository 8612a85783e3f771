"""Beyond the paper: an adversary that finds whole forgotten classes in the features.

What the cross-entropies of Fragment-Align reach is what the classifier says; beside it the features keep the forgotten
class, and a linear probe finds it. So the forgotten are trained against such a probe, as domains are made alike in
domain-adversarial training (Ganin et al. 2016, arXiv:1505.07818), with a discriminant in closed form in place of a
second network. docs/decisions.md has the figures.
"""

from __future__ import annotations

from torch import Tensor

from megu_cli.execution import LOCAL, Execution
from megu_cli.method.discriminant import Discriminant

# What a step counts of the one after it, while features change.
_LATELY = 0.9


class Adversary:
    """A discriminant on features, held back by one on thumbnails of the same images.

    What can be told apart by its looks is told apart by a model that never saw it, too: the adversary acts only while
    the features find more of the forgotten than 8x8 thumbnails do.

    Args:
        retained: (M,) the retained classes.
        classes: Number of classes K.
        execution: Device of the samples, and the processes that share the batches.

    Attributes:
        memory: What it knows so far, for `training.fit`.
    """

    def __init__(self, retained: Tensor, classes: int, execution: Execution = LOCAL) -> None:
        self.memory: dict[str, Tensor] = {}
        self._features = Discriminant(self.memory, "features", retained, classes, _LATELY, execution)
        self._looks = Discriminant(self.memory, "looks", retained, classes, 1, execution)

    def see(self, looks: Tensor, features: Tensor, labels: Tensor) -> None:
        """Take in the samples of a step, retained and forgotten.

        Args:
            looks: (B, C * 64) thumbnails.
            features: (B, D) penultimate features, without gradient.
            labels: (B,) true labels.
        """
        self._looks.see(looks, labels)
        self._features.see(features, labels)

    def loss(self, features: Tensor, number: int) -> Tensor:
        """How surely a step's forgotten samples are found, from 0 to 1; 0 while it is held back.

        Args:
            features: (B_f, D) penultimate features of the forgotten samples, or of a slice, with their gradient.
            number: How many forgotten samples the step has.
        """
        told_apart = (self._features.found > self._looks.found).to(features)
        return told_apart * self._features.loss(features, number)
