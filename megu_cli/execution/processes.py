"""The processes that share a computation, started by ``accelerate launch``; for the usual one of them nothing changes.

Every process makes the same draws for a whole batch and computes its slice of it; the gradients are averaged by
Hugging Face Accelerate. So results are those of one process, but for the rounding of sums in another order, and for
batch norm, which sees a slice at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megu_cli.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 is the one that writes, logs and prints."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


class Processes:
    """The processes that share a computation. This class is the usual case: one process."""

    rank = 0
    world = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def slice(self, number: int) -> slice:
        """This process's part of ``number`` samples; all of them where there are fewer than processes."""
        if number < self.world:
            return slice(0, number)
        return slice(number * self.rank // self.world, number * (self.rank + 1) // self.world)

    def weight(self, number: int) -> float:
        """What the mean over this process's part counts for, so that the processes' average is the mean over all."""
        part = self.slice(number)
        return 1.0 if number < self.world else self.world * (part.stop - part.start) / number

    def slices(self, number: int, most: int) -> int:
        """Number of slices, the same in all processes, in which each computes its part of ``number`` samples.

        At most ``most``, and at least two samples in each: batch norm cannot take the variance of one value.
        """
        part = number if number < self.world else number // self.world
        return max(1, min(most, part // 2))

    def device(self) -> torch.device | None:
        """Where this process computes; ``None`` where the config says it."""
        return None

    @contextlib.contextmanager
    def joined(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model as it is to be called in training: backward passes average the gradients over the processes."""
        yield model

    def mean(self, value: Tensor) -> Tensor:
        """The average over the processes."""
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order, on the device that they came from."""
        return rows

    def agreed(self, decision: bool) -> bool:
        """What the first process decided."""
        return decision

    def wait(self) -> None:
        """Go on when all processes have come here."""

    def close(self) -> None:
        """Take leave of the others."""


SINGLE = Processes()


class _Launched(Processes):
    """One of several processes, by Accelerate."""

    def __init__(self, cpu: bool) -> None:
        try:
            import accelerate
        except ImportError:
            raise ConfigError(
                "several processes need Hugging Face Accelerate", "pip install 'megu-cli[accelerate]'"
            ) from None
        from datetime import timedelta

        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        handlers: list[Any] = [
            # The first process may rate or measure for hours while the others wait.
            InitProcessGroupKwargs(timeout=timedelta(days=7)),
            # Every step has the same graph, in which some parameters may have no part.
            DistributedDataParallelKwargs(static_graph=True),
        ]
        self._by = accelerate.Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
        self.rank, self.world = self._by.process_index, self._by.num_processes

    def device(self) -> torch.device | None:
        device: torch.device = self._by.device
        return device

    @contextlib.contextmanager
    def joined(self, model: nn.Module) -> Iterator[nn.Module]:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            yield model
            return
        yield self._by.prepare_model(model)
        self._by.free_memory()

    def mean(self, value: Tensor) -> Tensor:
        result: Tensor = self._by.reduce(value, reduction="mean")
        return result

    def gather(self, rows: Tensor) -> Tensor:
        import torch

        own = rows.to(self._by.device)
        lengths = self._by.gather(torch.tensor([len(own)], device=self._by.device)).tolist()
        padded = self._by.gather(self._by.pad_across_processes(own, dim=0))
        parts = padded.split(max(lengths))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(rows.device)

    def agreed(self, decision: bool) -> bool:
        import torch
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor([int(decision)], device=self._by.device)).item())

    def wait(self) -> None:
        self._by.wait_for_everyone()

    def close(self) -> None:
        self._by.end_training()


def processes(device: str) -> Processes:
    """Return the processes of this computation.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, as in the config.

    Raises:
        ConfigError: There are several, and Accelerate is not installed, or the device is for one only.
    """
    if world() == 1:
        return SINGLE
    if device == "mps":
        raise ConfigError("device mps is for one process", "Leave out `accelerate launch`.")
    from megu_cli.execution.runtime import resolve_device

    return _Launched(cpu=resolve_device(device).type == "cpu")
