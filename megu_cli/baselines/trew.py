"""TREW: teach what is forgotten the original's opinion of the other classes, tilted towards similar ones.

Paper: Ebrahimpour-Boroojeny et al., 2026, Unlearning Isn't Forgetting, arXiv:2506.20893 (in earlier versions TRW).
Reference: https://github.com/CrowdDynamicsLab/ICML_TREW (not seen: the method is written from the paper's description).
Notes: Made for whole classes; for another request each image's own class alone is left out of its target. The paper
takes cosines between the classifier's rows after a principal component analysis, and sharpens them by a softmax. Here
all components are kept, which is to centre the rows, and the temperature of the softmax is megu's choice. The tilt of
10 is the paper's. Retained and forgotten images go through the model in one pass, and the loss is the mean over both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import BASELINE_EPOCHS, Task, teacher, together
from megu_cli.models.features import classifier


def trew(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = BASELINE_EPOCHS,
    lr: float = 0.02,
    beta: float = 10.0,
    temperature: float = 0.5,
) -> None:
    """Minimise the cross-entropy on D_r with true labels and on D_f with `tilted` targets.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        beta: Strength of the tilt; 0 keeps the proportions of the original's output.
        temperature: Of the softmax over similarities; a lower one leaves the tilt to the most similar class.

    Raises:
        CheckpointError: The model has no classifier whose rows could be compared.
    """
    weight = classifier(model, task.classes).weight
    assert isinstance(weight, Tensor)
    original, labels = teacher(model), task.labels
    scores = similarity(weight.detach().flatten(1).float(), task.forgotten, temperature)

    def loss(net: nn.Module, x: Tensor, y: Tensor, gone: Tensor, slots: Tensor) -> Tensor:
        kept, lost = together(net, x, gone)
        with torch.no_grad():
            target = tilted(original(gone).float(), scores[labels[slots].to(gone.device)], beta)
        certain = functional.one_hot(y, task.classes).to(target)
        return functional.cross_entropy(torch.cat([kept, lost]), torch.cat([certain, target]))

    task.fit_pairs(model, "trew", loss, epochs=epochs, lr=lr)


def similarity(weight: Tensor, forgotten: list[int], temperature: float) -> Tensor:
    """(K, K): row y is a distribution over the classes that y resembles, without y and forgotten classes.

    Args:
        weight: (K, D) rows of the classifier.
        forgotten: Classes that no target may name.
        temperature: Of the softmax over cosines.
    """
    rows = functional.normalize(weight - weight.mean(0), dim=1)
    left_out = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    left_out[:, forgotten] = True
    return (rows @ rows.T / temperature).masked_fill(left_out, float("-inf")).softmax(1)


def tilted(logits: Tensor, scores: Tensor, beta: float) -> Tensor:
    """(B, K) distributions q(c) proportional to p(c) exp(beta s(c)) over the classes with a score s(c) above 0.

    Of all distributions over these classes with the same mean score, q has the least KL(q || p).

    Args:
        logits: (B, K) of the original, whose softmax is p.
        scores: (B, K) similarities to the class that is forgotten; 0 leaves a class out.
        beta: Strength of the tilt.
    """
    return (logits + beta * scores).masked_fill(scores == 0, float("-inf")).softmax(1)
