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

# Ridge penalty, as a share of the features' mean variance: few forgotten images would be fitted too closely.
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
        sides: (split, (N,) positions, N > 0, (N, G) wanted log-odds), each side counted as a whole: the forget set, and
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
    size, targets = head.weight.shape[1], len(gone)
    # Weighted moments of the features and of the wanted logits: the features would take memory with the data.
    x, t = torch.zeros(size, dtype=torch.float64), torch.zeros(targets, dtype=torch.float64)
    xx, xt = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, targets, dtype=torch.float64)
    for split, index, odds in sides:
        weight, start = 1 / (len(index) * len(sides)), 0
        passes = training.outputs(model, split, index, classes=classes, label="calibrate", execution=execution)
        for positions, batch in passes:
            if not _linear(head, batch.features, batch.logits):
                return False
            features, stop = batch.features.double(), start + len(positions)
            wanted = odds[start:stop].double() + _retained(batch.logits.double(), gone)[:, None]
            x, t = x + weight * features.sum(0), t + weight * wanted.sum(0)
            xx, xt = xx + weight * features.T @ features, xt + weight * features.T @ wanted
            start = stop
    # Without a bias the line goes through the origin.
    x, t = (torch.zeros_like(x), torch.zeros_like(t)) if head.bias is None else (x, t)
    covariance = xx - torch.outer(x, x)
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(size, dtype=torch.float64)
    slope = torch.linalg.solve(covariance + ridge, xt - torch.outer(x, t))
    with torch.no_grad():
        head.weight[list(gone)] = slope.T.to(head.weight)
        if head.bias is not None:
            head.bias[list(gone)] = (t - x @ slope).to(head.bias)
    return True


def _retained(logits: Tensor, gone: Sequence[int]) -> Tensor:
    """(N,) logarithm of the sum of exponentials over the retained classes."""
    return logits.index_fill(1, torch.tensor(gone, dtype=torch.int64), float("-inf")).logsumexp(1)


def _linear(head: nn.Linear, features: Tensor, logits: Tensor) -> bool:
    """Whether the logits (N, K) are the layer's output on the features (N, D)."""
    weight = head.weight.detach().float().cpu()
    if features.shape[1] != weight.shape[1]:
        return False
    expected = features @ weight.T + (0 if head.bias is None else head.bias.detach().float().cpu())
    return bool((expected - logits).abs().max() <= _LINEAR * (1 + logits.abs().max()))
