"""AMUN: finetune on the nearest adversarial examples of the forgotten images, with the labels that they get.

Paper: Ebrahimpour-Boroojeny et al., 2025, Not All Wrong is Bad: Using Adversarial Examples for Unlearning,
arXiv:2503.00917.
Reference: https://github.com/Ali-E/AMUN
Notes: Made for single images and random shares, whose true labels stay in the training set, as in the reference. Images
of wholly forgotten classes leave it (there "advonly"), and their adversarial examples are of retained classes. The
attack is the reference's (steps of a tenth of the radius along the gradient, a radius that doubles from 0.04), but each
image stops on its own, and a radius has 10 steps in place of 50: more would cost more than retraining. The learning
rate falls as a cosine from 0.05 over 2 epochs; in the reference from 0.01, to a tenth after each of 10 epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import BASELINE_EPOCHS, Task, teacher
from megu_cli.training import shuffled

# Length in L2, of pixels from 0 to 1, at which the search for an adversarial example starts, and how often it doubles.
_RADIUS, _DOUBLINGS = 0.04, 16


def amun(model: nn.Module, task: Task, *, epochs: int = BASELINE_EPOCHS, lr: float = 0.05, steps: int = 10) -> None:
    """Minimise the cross-entropy on D_r, on D_f with adversarial labels and, but for whole classes, on D_f as it is.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        steps: Steps of the attack within a radius.
    """
    moved, wrong = adversarial_set(model, task, steps)
    number, labels = len(task.split), torch.cat([task.split.labels, wrong])
    staying = task.forget[~task.of_forgotten_classes]
    whole = torch.cat([task.retain, staying, number + torch.arange(len(wrong))])
    samples = round(task.samples * len(whole) / len(task.retain))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = shuffled(whole, samples, task.batch, task.seed, "amun", epoch)
        known = [positions[positions < number] for positions in order]
        images = task.split.batches([positions for positions in known if len(positions)], task.device)
        for positions, real in zip(order, known, strict=True):
            made = positions[positions >= number]
            x = [*([next(images)] if len(real) else []), moved[made - number].to(task.device)]
            yield (
                torch.cat(x).contiguous(memory_format=torch.channels_last),
                labels[torch.cat([real, made])].to(task.device),
            )

    task.fit(
        model,
        "amun",
        epochs=epochs,
        steps=math.ceil(samples / task.batch),
        batches=batches,
        loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
        lr=lr,
    )


def adversarial_set(model: nn.Module, task: Task, steps: int) -> tuple[Tensor, Tensor]:
    """(N_f, C, H, W) adversarial examples of D_f, normalised, and the (N_f,) labels that the model gives them."""
    frozen, mean, std = teacher(model), task.split.mean.to(task.device), task.split.std.to(task.device)
    images, labels = [], []
    with task.track("amun attack", math.ceil(len(task.forget) / task.batch)) as advance:
        for positions, x in task.split.pass_over(task.forget, task.batch, task.device):
            y = task.split.labels[positions].to(x.device)
            banned = functional.one_hot(y, task.classes).bool()
            banned[:, task.forgotten] = True
            moved, wrong = nearest_adversarial(lambda z: frozen((z - mean) / std), x * std + mean, banned, y, steps)
            images.append(((moved - mean) / std).cpu())
            labels.append(wrong.cpu())
            advance()
    return torch.cat(images), torch.cat(labels)


def nearest_adversarial(
    model: Callable[[Tensor], Tensor], x: Tensor, banned: Tensor, labels: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Images near ``x`` of a class that is not banned, and their (B,) classes.

    The radius doubles for an image until there is one; what is found last counts, also where there is none.

    Args:
        model: (B, C, H, W) images -> logits; no parameter needs a gradient.
        x: (B, C, H, W) images, from 0 to 1.
        banned: (B, K) bool, classes that an adversarial example may not have.
        labels: (B,) true labels, whose loss is ascended.
        steps: Steps within a radius, each a tenth of it.
    """
    moved, radius = x.clone(), _RADIUS
    searching = torch.arange(len(x), device=x.device)
    for _ in range(_DOUBLINGS):
        for _ in range(steps):
            searching, gradient = _still(model, moved, banned, labels, searching)
            if not len(searching):
                break
            step = moved[searching] + radius / 10 * gradient / _norm(gradient)
            away = step - x[searching]
            inside = x[searching] + away * (radius / _norm(away)).clamp_max(1)
            moved[searching] = inside.clamp(0, 1)
        if not len(searching):
            break
        radius *= 2
    with torch.no_grad():
        return moved, model(moved).masked_fill(banned, float("-inf")).argmax(1)


def _still(
    model: Callable[[Tensor], Tensor], moved: Tensor, banned: Tensor, labels: Tensor, searching: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of the images that still have a banned class, and the gradients of their losses."""
    with torch.enable_grad():
        at = moved[searching].requires_grad_()
        logits = model(at)
        loss = functional.cross_entropy(logits, labels[searching], reduction="sum")
        gradient = torch.autograd.grad(loss, at)[0]
    left = banned[searching].gather(1, logits.argmax(1, keepdim=True))[:, 0]
    return searching[left], gradient[left]


def _norm(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return length.clamp_min(1e-20)
