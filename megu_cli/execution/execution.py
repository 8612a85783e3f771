"""Where and how a computation runs, as one object that every training and prediction takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.execution.runtime import Track, silent

if TYPE_CHECKING:
    import torch


class ResumePoint(Protocol):
    """Saves the state of a training, so that a killed run can continue it."""

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state of the same work; ``None`` if there is none."""

    def due(self) -> bool:
        """True if it is time to save."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state."""


@dataclass(frozen=True)
class Execution:
    """Where and how a computation runs. The defaults are a single process on the CPU.

    Attributes:
        device: Device of the model and the batches.
        seed: Seed of all random draws.
        eval_batch: Samples per forward pass in predictions.
        processes: The processes that share the work.
        track: Reports progress.
        resume: Saves the state of a training; ``None``: a killed training starts over.
    """

    device: torch.device | str = "cpu"
    seed: int = 0
    eval_batch: int = 1000
    processes: Processes = field(default=SINGLE, compare=False)
    track: Track = field(default=silent, compare=False)
    resume: ResumePoint | None = field(default=None, compare=False)

    @property
    def unshared(self) -> Execution:
        """The same execution in this process alone and without a resume point."""
        return replace(self, processes=SINGLE, resume=None)


# The default of every computation.
LOCAL = Execution()
