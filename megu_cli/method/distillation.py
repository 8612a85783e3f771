"""A term of the finetuning that keeps outputs without images where they were (not in the paper).

A model may have outputs for classes of which there are no images: 1,000 outputs and a folder of eight classes. Training
on the eight alone makes it forget the others. On retained images, the term holds the model to the original's answers
for these outputs: knowledge distillation (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531), as Learning without
Forgetting (Li and Hoiem, 2016, arXiv:1606.09282) uses it. Deviation: all other outputs count as one.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

# High, so that outputs that are never near the top count as well; see docs/decisions.md.
_TEMPERATURE = 8.0


class Distillation:
    """The original model's answers for some outputs.

    Args:
        model: The original model; it is copied.
        outputs: (K,) bool, the outputs to keep where they are.
    """

    def __init__(self, model: nn.Module, outputs: Tensor) -> None:
        self._original = copy.deepcopy(model).eval().requires_grad_(False)
        self._outputs = outputs.to(next(model.parameters()).device)

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """Divergence of the model's answers from the original's, the mean over the images; 0 for no images.

        Args:
            images: (B, C, H, W).
            logits: (B, K), the model's.
        """
        if not len(images):
            return logits.sum()
        with torch.no_grad():
            before = self._log_probabilities(self._original(images))
        now = self._log_probabilities(logits)
        apart = functional.kl_div(now, before, reduction="batchmean", log_target=True)
        # Gradients of the size that they have without a temperature.
        return apart * _TEMPERATURE**2

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """(B, 1 + outputs) of each output, and of all others together."""
        log_p = functional.log_softmax(logits.float() / _TEMPERATURE, 1)
        others = log_p[:, ~self._outputs].logsumexp(1, keepdim=True)
        return torch.cat([log_p[:, self._outputs], others], 1)
