"""Bad Teacher: learn what is retained from the original, what is forgotten from an ignorant model.

Paper: Chundawat et al., 2023, Can Bad Teaching Induce Forgetting?, arXiv:2205.08096.
Reference: https://github.com/vikram2000b/bad-teaching-unlearning
Notes: Both teachers are in eval mode. SGD rather than Adam, as for every method here. The divergence is summed over
classes. The incompetent teacher is randomly initialised, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megu_cli.baselines.task import Task, divergence, teacher, together


def bad_teacher(
    model: nn.Module, task: Task, *, epochs: int = 1, lr: float = 0.01, weight: float = 1.0, temperature: float = 1.0
) -> None:
    """Minimise KL(original || student) on D_r + weight KL(random model || student) on D_f.

    Args:
        model: Changed in place.
        task: The request.
        epochs: Passes.
        lr: SGD learning rate at the start.
        weight: Of the loss on forgotten images.
        temperature: Of the distillation.
    """
    competent, incompetent = teacher(model), teacher(task.fresh("bad_teacher"))

    def loss(net: nn.Module, x: Tensor, _: Tensor, gone: Tensor, __: Tensor) -> Tensor:
        kept, lost = together(net, x, gone)
        with torch.no_grad():
            good, bad = competent(x), incompetent(gone)
        return divergence(kept, good, temperature) + weight * divergence(lost, bad, temperature)

    task.fit_pairs(model, "bad_teacher", loss, epochs=epochs, lr=lr)
