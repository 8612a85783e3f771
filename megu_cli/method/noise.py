"""Stage 3: the positive-negative feature noise pair (MeGU, arXiv:2602.17088).

Noises are images in normalised space. They are trained against the frozen original model in eval mode, in batches
per group (a perturbing label, a forgotten class), never per sample: the cost does not grow with the forget set.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.config import NoiseConfig
from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.execution.runtime import generator
from megu_cli.models.features import frozen
from megu_cli.training import cut


def train_noise(
    model: nn.Module,
    split: Split,
    index: Tensor,
    group: Tensor,
    target: Tensor,
    settings: NoiseConfig,
    *,
    away: bool,
    batch: int,
    label: str,
    accumulate: int = 1,
    execution: Execution = LOCAL,
) -> Tensor:
    """Train a batch of noises for each group by Adam.

    Towards the target, min CE(f(x + n), t) + penalty * mean(n^2): the positive noise N+ on forgotten samples assigned
    to t, and the carrying negative noise N- on retained samples. Away from it, the cross-entropy is to grow; its
    bounded form is min -log(1 - p(t | x + n)), which ends at 0. With ``input: alone``, as in the paper, f sees n in
    place of x + n, and an image is read for its size alone.

    Args:
        model: The original classifier f; neither its parameters nor its batch-norm statistics change.
        split: The images.
        index: (N,) positions of the samples that the noises are trained on.
        group: (N,) the group of each sample, out of G.
        target: (G,) class that each group's noises move towards, or away from.
        settings: The section ``noise`` of the config: noises per group, what f sees, steps, learning rate and penalty.
        away: Away from the target rather than towards it.
        batch: Samples per step, drawn evenly over the groups.
        label: ``positive`` or ``negative``: names the random streams and the progress.
        accumulate: Slices of a step, whose gradients are summed.
        execution: Device, seed, processes and progress.

    Returns:
        (G, noises, C, H, W) float32 on the CPU.
    """
    steps, noises, processes, device = settings.steps, settings.batch, execution.processes, execution.device
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=len(target))
    starts = counts.cumsum(0) - counts
    draw = generator(execution.seed, "noise", label)
    chosen = torch.randint(len(target), (steps, batch), generator=draw)
    within = (torch.rand(steps, batch, generator=draw) * counts[chosen]).long()
    positions = index[order[starts[chosen] + within]]
    which = torch.randint(noises, (steps, batch), generator=draw)

    first = next(split.batches([index[:1]]))
    start = 0.01 * torch.randn(len(target), noises, *first.shape[1:], generator=draw)
    noise = start.to(device).requires_grad_()
    optimizer = torch.optim.Adam([noise], settings.lr)
    part = processes.slice(batch)
    positions, chosen, which = positions[:, part], chosen[:, part], which[:, part]
    if settings.input == "alone":
        images: Iterable[Tensor] = [torch.zeros(chosen.shape[1], 1, 1, 1, device=device)] * steps
    else:
        images = split.batches(list(positions), device)
    with frozen(model), execution.track(f"{label} noise", steps) as advance:
        for x, g, r in zip(images, chosen, which, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for some in cut(len(x), processes.slices(batch, accumulate)):
                added = noise[g[some], r[some]]
                logits = model((x[some] + added).contiguous(memory_format=torch.channels_last)).float()
                to = target[g[some]]
                loss = _away(logits, to) if away else functional.cross_entropy(logits, to.to(device))
                share = processes.weight(batch) * len(added) / len(x)
                loss = (loss + settings.penalty * added.square().mean()) * share
                loss.backward()
            if noise.grad is not None:
                noise.grad = processes.mean(noise.grad)
            optimizer.step()
            advance()
    return noise.detach().cpu().contiguous()


def _away(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of -log(1 - p(target))."""
    sure = functional.log_softmax(logits, 1).gather(1, target.to(logits.device)[:, None])[:, 0]
    return -torch.log1p(-sure.exp().clamp_max(1 - 1e-6)).mean()
