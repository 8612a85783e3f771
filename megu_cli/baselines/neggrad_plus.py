"""NegGrad+: descent on what is retained, ascent on what is forgotten.

Paper: Kurmanji et al., 2023, Towards Unbounded Machine Unlearning (SCRUB), arXiv:2302.09880, its strongest baseline.
Reference: https://github.com/meghdadk/SCRUB
Notes: The weight of the ascent is ``beta`` where the paper writes (1 - beta). Both parts go through the model in one
pass.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import BASELINE_EPOCHS, Task, together


def neggrad_plus(
    model: nn.Module, task: Task, *, epochs: int = BASELINE_EPOCHS, lr: float = 0.01, beta: float = 0.011
) -> None:
    """Minimise (1 - beta) CE(D_r) - beta CE(D_f).

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        beta: Weight of the ascent, from 0 to 1.
    """
    labels = task.labels

    def loss(net: nn.Module, x: Tensor, y: Tensor, gone: Tensor, slots: Tensor) -> Tensor:
        kept, lost = together(net, x, gone)
        return ascent_loss(kept, y, lost, labels[slots].to(y.device), beta)

    task.fit_pairs(model, "neggrad_plus", loss, epochs=epochs, lr=lr)


def ascent_loss(kept: Tensor, labels: Tensor, lost: Tensor, lost_labels: Tensor, beta: float) -> Tensor:
    """(1 - beta) CE(kept) - beta CE(lost) of logits (B, K) and (B', K)."""
    return (1 - beta) * functional.cross_entropy(kept, labels) - beta * functional.cross_entropy(lost, lost_labels)
