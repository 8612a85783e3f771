"""UNSIR: impair with error-maximising noise under the forgotten label, then repair.

Paper: Tarun et al., 2021, Fast Yet Effective Machine Unlearning, arXiv:2111.08947.
Reference: https://github.com/vikram2000b/Fast-Machine-Unlearning
Notes: A noise for each place of a batch, all of them used (the reference's loop over channels uses three). Made for
whole classes; for another request the noises are of the classes that occur in D_f. SGD rather than Adam for the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.finetune import finetune
from megu_cli.baselines.task import Task, together
from megu_cli.execution.runtime import generator
from megu_cli.models.features import frozen


def unsir(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 1,
    lr: float = 0.02,
    repair_epochs: int = 1,
    repair_lr: float = 0.01,
    noise_steps: int = 40,
    noise_lr: float = 0.1,
    penalty: float = 0.1,
) -> None:
    """Learn the noise, train on it beside D_r (impair), then on D_r alone (repair).

    Args:
        model: Changed in place.
        task: The request.
        epochs: Impair passes.
        lr: SGD learning rate of the impair passes.
        repair_epochs: Repair passes.
        repair_lr: SGD learning rate of the repair passes.
        noise_steps: Adam steps of the noise.
        noise_lr: Its learning rate, in normalised pixel units.
        penalty: Weight of the noise's squared norm.
    """
    classes = task.labels.unique()
    labels = classes.repeat_interleave(max(1, task.forget_batch // len(classes)))
    noise = train_noise(model, task, labels, noise_steps, noise_lr, penalty)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # The reference mixes noises and images in one data set: one mean over both.
        return functional.cross_entropy(torch.cat(together(net, x, noise)), torch.cat([y, labels.to(y.device)]))

    task.fit_retained(model, "unsir", loss, epochs=epochs, lr=lr)
    finetune(model, task, epochs=repair_epochs, lr=repair_lr, name="unsir repair")


def train_noise(model: nn.Module, task: Task, labels: Tensor, steps: int, lr: float, penalty: float) -> Tensor:
    """(len(labels), C, H, W) noises that the frozen model finds least like their labels."""
    shape = next(task.split.batches([task.forget[:1]])).shape[1:]
    start = torch.randn(len(labels), *shape, generator=generator(task.seed, "unsir", "noise"))
    noise = start.to(task.device).requires_grad_()
    target = labels.to(task.device)
    optimizer = torch.optim.Adam([noise], lr)
    with frozen(model), task.track("unsir noise", steps) as advance:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            error_maximising_loss(model(noise), target, noise, penalty).backward()
            optimizer.step()
            advance()
    return noise.detach().contiguous(memory_format=torch.channels_last)


def error_maximising_loss(logits: Tensor, labels: Tensor, noise: Tensor, penalty: float) -> Tensor:
    """-CE(f(N), y) + penalty * mean over noises of the squared norm of N (eq. 2 of the paper).

    Args:
        logits: (B, K) of the noises.
        labels: (B,) the forgotten labels.
        noise: (B, C, H, W).
        penalty: lambda.
    """
    return -functional.cross_entropy(logits, labels) + penalty * noise.square().sum((1, 2, 3)).mean()
