"""SVD: project out of each layer's input what forgotten images use and retained ones do not, in closed form.

Paper: Kodge et al., 2024, Deep Unlearning: Fast and Efficient Gradient-free Class Forgetting, arXiv:2312.00761.
Reference: https://github.com/sangamesh-kodge/class_forgetting
Notes: Made for whole classes. The singular vectors are the eigenvectors of the inputs' second moments, so all patches
of the samples count, where the reference draws 10,000. As there, a convolution is seen through one random window per
batch, of three kernel sizes; here it may hold the padding of the map's border, and no other. Convolutions with groups
and the projections inside torch's own attention layer are left alone. The reference searches both scales per data set:
100 and 3 for CIFAR-10, 1,000 and 30 for CIFAR-100, 100 and 10 for ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli.baselines.task import Task
from megu_cli.execution.runtime import generator
from megu_cli.models.features import evaluating


def svd(model: nn.Module, task: Task, *, alpha_r: float = 100.0, alpha_f: float = 3.0, samples: int = 900) -> None:
    """Multiply the weight of every linear layer and convolution by its `projection`.

    Args:
        model: Changed in place.
        task: The request.
        alpha_r: Scale of the retained images' importances; larger retains more directions.
        alpha_f: Scale of the forgotten images' importances; larger removes more directions.
        samples: Images of each side: as many of every retained class, and of D_f.
    """
    draw = generator(task.seed, "svd", "samples")
    labels = task.split.labels[task.retain]
    present = labels.unique()
    share = max(1, samples // len(present))
    retained = torch.cat([_some(task.retain[labels == label], share, draw) for label in present])
    kept = second_moments(model, task, retained, "retain")
    lost = second_moments(model, task, _some(task.forget, samples, draw), "forget")
    with torch.no_grad():
        for name, moments in kept.items():
            matrix = projection(important(moments, alpha_r), important(lost[name], alpha_f))
            weight = layers(model)[name].weight
            weight.copy_((weight.flatten(1).to(matrix) @ matrix.T).view_as(weight))
    model.eval()


def _some(index: Tensor, number: int, draw: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=draw)[:number]]


def layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name -> linear layer or convolution without groups."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear) or layer.groups == 1}


def second_moments(model: nn.Module, task: Task, index: Tensor, label: str) -> dict[str, Tensor]:
    """Name of a layer -> (D, D) sum of a a^T over its inputs a, patches of D numbers; no layer that was not called."""
    found: dict[str, Tensor] = {}
    draw = generator(task.seed, "svd", label, "windows")

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = patches(layer, inputs[0].detach().float(), draw)
            found[name] = found[name] + a.T @ a if name in found else a.T @ a

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers(model).items()]
    try:
        with evaluating(model), torch.no_grad():
            for _, x in task.split.pass_over(index, task.batch, task.device):
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def patches(layer: nn.Module, x: Tensor, draw: torch.Generator) -> Tensor:
    """(N, D) inputs of the products of a layer: rows of a linear one, patches of a window of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if not isinstance(layer.padding, str):
        high, wide = layer.padding
        x = functional.pad(x, (wide, wide, high, high))
    for axis, kernel, step in (
        (2, layer.kernel_size[0], layer.dilation[0]),
        (3, layer.kernel_size[1], layer.dilation[1]),
    ):
        size = min(x.shape[axis], 3 * ((kernel - 1) * step + 1))
        first = int(torch.randint(0, x.shape[axis] - size + 1, (1,), generator=draw))
        x = x.narrow(axis, first, size)
    columns = functional.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def important(moments: Tensor, alpha: float) -> Tensor:
    """(D, D) matrix U diag(alpha s / ((alpha - 1) s + 1)) U^T, with s each direction's share of the variance.

    Args:
        moments: (D, D) sum of a a^T.
        alpha: Scale; a direction of share s counts fully as alpha s grows.
    """
    # Doubles, which Apple's GPUs do not have.
    values, vectors = torch.linalg.eigh((moments.cpu() if moments.device.type == "mps" else moments).double())
    values = values.clamp_min(0)
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    matrix: Tensor = (vectors * (alpha * share / ((alpha - 1) * share + 1))) @ vectors.T
    return matrix.to(moments)


def projection(retained: Tensor, forgotten: Tensor) -> Tensor:
    """(D, D) matrix P of the update W P^T: I - (M_f - M_f M_r), which removes what is forgotten and not retained."""
    unit = torch.eye(len(retained), dtype=retained.dtype, device=retained.device)
    return unit - (forgotten - forgotten @ retained)
