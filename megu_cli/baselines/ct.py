"""Convolution Transpose: transpose every convolution kernel, and finetune.

Paper: Cadet et al., 2024, Deep Unlearn, arXiv:2410.01276 (there CT; the fifth place of the NeurIPS 2023 unlearning
challenge).
Reference: https://github.com/xcadet/deepunlearn, munl/unlearning/kgltop5.py
Notes: Rows and columns of each kernel change places; what is not square is left alone, and a 1x1 kernel stays the same.
"""

from __future__ import annotations

import torch
from torch import nn

from megu_cli.baselines.finetune import finetune
from megu_cli.baselines.task import Task


def ct(model: nn.Module, task: Task, *, epochs: int = 5, lr: float = 0.05) -> None:
    """Transpose the kernels, then finetune on D_r.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Finetuning passes.
        lr: SGD learning rate at the start.
    """
    transpose_kernels(model)
    finetune(model, task, epochs=epochs, lr=lr, name="ct")


def transpose_kernels(model: nn.Module) -> None:
    """Swap the two spatial axes of every square convolution kernel, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] == module.kernel_size[1]:
                module.weight.copy_(module.weight.transpose(2, 3).clone())
