"""Beyond the paper: the output that a forgotten class leaves behind.

A retrained model has that output too, and no image has ever raised it: its log-odds are about -10. The finetuning
starts from a model that knows the class, and lowers them far beyond, to -30. No prediction shows it, but an attack
that compares confidences does (`megu_cli.evaluation.ulira`). The proxy has never seen the class either. So the class's
row of the classifier is set anew, in closed form, to give the log-odds that the proxy gives. docs/decisions.md has the
figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megu_cli import training
from megu_cli.data import Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.models.features import classifier, has_head

# Ridge penalty, as a share of the features' mean variance: few forgotten images must not be learned by heart.
_RIDGE = 1.0
# A logit may differ by this much, relative to the largest, from the linear layer's output on the features.
_LINEAR = 1e-2


def log_odds(logits: Tensor, gone: Sequence[int]) -> Tensor:
    """(N, G) log-odds of each of G forgotten classes against all retained ones, in nats.

    Args:
        logits: (N, K), or log-probabilities.
        gone: The forgotten classes, fewer than K.
    """
    logits = logits.double()
    return logits[:, list(gone)] - _retained(logits, gone)[:, None]


def calibrate(
    model: nn.Module,
    sides: Sequence[tuple[Split, Tensor, Tensor]],
    gone: Sequence[int],
    classes: int,
    execution: Execution = LOCAL,
) -> bool:
    """Set the classifier's rows of the forgotten classes, in place, by a ridge regression on the features.

    Args:
        model: The unlearned model.
        sides: (split, (N,) positions, (N, G) wanted log-odds), each side counted as a whole: the forget set, and
            held-out images of retained classes.
        gone: G forgotten classes.
        classes: Number of classes K.
        execution: Device, and the processes that share the predictions.

    Returns:
        False where the model's logits are not a linear layer's output on its penultimate features; it is then left as
        it was.
    """
    head = classifier(model, classes) if has_head(model, classes) else None
    # A weight that is computed from others cannot be set.
    if not isinstance(head, nn.Linear) or "weight" not in dict(head.named_parameters(recurse=False)):
        return False
    rows, wanted, weights = [], [], []
    for split, index, _ in sides:
        passes = training.outputs(model, split, index, classes=classes, label="calibrate", execution=execution)
        for _, batch in passes:
            if not _linear(head, batch.features, batch.logits):
                return False
            rows.append(batch.features.double())
            wanted.append(_retained(batch.logits.double(), gone)[:, None])
        weights.append(torch.full((len(index), 1), 1 / max(len(index), 1), dtype=torch.float64))
    x, weight = torch.cat(rows), torch.cat(weights) / len(sides)
    target = torch.cat(wanted) + torch.cat([odds.double() for *_, odds in sides])
    # Without a bias the line goes through the origin.
    zero = torch.zeros(1, dtype=torch.float64)
    middle, level = (zero, zero) if head.bias is None else ((weight * x).sum(0), (weight * target).sum(0))
    centred = x - middle
    covariance = (weight * centred).T @ centred
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance), dtype=torch.float64)
    slope = torch.linalg.solve(covariance + ridge, (weight * centred).T @ (target - level))
    with torch.no_grad():
        head.weight[list(gone)] = slope.T.to(head.weight)
        if head.bias is not None:
            head.bias[list(gone)] = (level - middle @ slope).to(head.bias)
    return True


def _retained(logits: Tensor, gone: Sequence[int]) -> Tensor:
    """(N,) logarithm of the sum of exponentials over the retained classes."""
    return logits.index_fill(1, torch.tensor(gone, dtype=torch.int64), float("-inf")).logsumexp(1)


def _linear(head: nn.Linear, features: Tensor, logits: Tensor) -> bool:
    """Whether the logits (N, K) are the layer's output on the features (N, D)."""
    weight = head.weight.detach().float().cpu()
    if features.shape[1] != weight.shape[1]:
        return False
    found = features @ weight.T + (0 if head.bias is None else head.bias.detach().float().cpu())
    return bool((found - logits).abs().max() <= _LINEAR * (1 + logits.abs().max()))
