"""Masked Small Gradients: re-initialise the weights on which forgetting and retaining agree least, and finetune.

Paper: Cadet et al., 2024, Deep Unlearn, arXiv:2410.01276 (there MSG; the second place of the NeurIPS 2023 unlearning
challenge).
Reference: https://github.com/xcadet/deepunlearn, munl/unlearning/kgltop2.py
Notes: In each convolution, the share of weights with the smallest |gradient of CE(D_r sample) - CE(D_f)| is drawn anew;
while finetuning, the gradient of the others is multiplied by 0.1. As many retained samples as there are forgotten ones
(at most all). Gradients are taken in eval mode.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megu_cli.baselines.finetune import finetune
from megu_cli.baselines.task import Task, summed
from megu_cli.execution.runtime import generator
from megu_cli.training import masked_gradients


def msg(model: nn.Module, task: Task, *, epochs: int = 5, lr: float = 0.05, share: float = 0.3) -> None:
    """Re-initialise small-gradient weights, then finetune on D_r.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Finetuning passes.
        lr: SGD learning rate at the start.
        share: Of each convolution's weights to re-initialise.
    """
    draw = generator(task.seed, "msg", "init")
    sample = task.retain[torch.randperm(len(task.retain), generator=draw)[: len(task.forget)]]
    # Summed over batches, as the reference does, of the gradient of each batch's mean loss.
    kept, lost = (summed(task.gradients(model, index)) for index in (sample, task.forget))
    masks = {}
    with torch.no_grad():
        for key, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                small = smallest((kept[f"{key}.weight"] - lost[f"{key}.weight"]).abs(), share)
                fan_out = weight.shape[0] * weight[0, 0].numel() // module.groups
                anew = torch.randn(weight.shape, generator=draw).to(weight) * (2 / fan_out) ** 0.5
                weight.copy_(torch.where(small, anew, weight))
                masks[f"{key}.weight"] = torch.where(small, 1.0, 0.1).to(weight)
    with masked_gradients(model, masks):
        finetune(model, task, epochs=epochs, lr=lr, name="msg")


def smallest(size: Tensor, share: float) -> Tensor:
    """Bool mask of the smallest ``share`` of the entries."""
    chosen = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
    chosen[size.flatten().topk(round(share * size.numel()), largest=False).indices] = True
    return chosen.view_as(size)
