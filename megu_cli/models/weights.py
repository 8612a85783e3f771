"""Weights in memory: put into a model, compared with what was given, and which of them the logits depend on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megu_cli.errors import CheckpointError
from megu_cli.models.features import frozen, outputs_hint

State = dict[str, Tensor]


def unreached(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the parameters that the logits do not depend on, such as those of auxiliary heads.

    No loss on the logits changes them. Told by the gradients of one pass in eval mode.
    """
    with frozen(model), torch.enable_grad():
        model.requires_grad_(True)
        gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
        return [name for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g is None]


def names_of_tensors(model: nn.Module) -> list[list[str]]:
    """The names of each tensor of a model's state dict: more than one where it is tied."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def load_state(model: nn.Module, state: State, source: str) -> nn.Module:
    """Load weights strictly. Of tied weights one is enough.

    Raises:
        CheckpointError: Keys or shapes differ (the differences are listed), or a weight is not finite.
    """
    own = model.state_dict()
    tied = [group for group in names_of_tensors(model) if len(group) > 1]
    alias = {name: next((n for n in group if n in state), name) for group in tied for name in group}
    missing = [f"missing: {key}" for key in own if alias.get(key, key) not in state]
    unexpected = [f"unexpected: {key}" for key in state if key not in own]
    faults = [*missing[:5], *unexpected[:5], *missing[5:], *unexpected[5:]]  # some of both are shown
    faults += [
        f"shape of {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if not faults:
        faults = [
            f"values: {name} and {first} differ, and are one tensor in the model"
            for name, first in alias.items()
            if name in state and not torch.equal(state[name], state[first])
        ]
    if faults:
        hint = "model.name is another architecture, or the channels differ."
        if all(fault.startswith("shape") for fault in faults) and (k := _other_classes(state, own)):
            hint = f"The checkpoint has {k[0]:,} classes, and the data have {k[1]:,}.\n{outputs_hint(*k)}"
        told = "\n".join(f"  {fault}" for fault in faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(f"{source} does not fit the model ({len(faults)} differences)\n{told}{more}", hint)
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinite weights in {', '.join(broken[:4])}",
            "The training that made it diverged.",
        )
    model.load_state_dict({key: state[alias.get(key, key)] for key in own}, strict=True)
    return model


def _other_classes(state: State, own: State) -> tuple[int, int] | None:
    """The outputs of the checkpoint and of the model, where the layers that differ do so in their outputs alone."""
    apart = [(state[key].shape, value.shape) for key, value in own.items() if state[key].shape != value.shape]
    outputs = {(a[0], b[0]) for a, b in apart if a[1:] == b[1:] and a and b}
    return outputs.pop() if len(outputs) == 1 and all(a[1:] == b[1:] for a, b in apart) else None


def like(state: State, original: State) -> State:
    """``state`` in the dtypes of ``original``, key by key, so that the result is a drop-in."""
    return {key: state[key].detach().cpu().to(value.dtype) for key, value in original.items()}
