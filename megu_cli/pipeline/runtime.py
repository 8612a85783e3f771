"""Where and how a run computes: device, precision, processes and progress."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from megu_cli.config import Config
from megu_cli.execution.runtime import Track, silent

if TYPE_CHECKING:
    import torch

    from megu_cli.execution.processes import Processes


class Runtime:
    """Where and how a run computes.

    Args:
        config: The config.
        track: Reports progress.
        device: The device of another run; ``None``: the one that the config names.
    """

    def __init__(self, config: Config, track: Track = silent, device: torch.device | None = None) -> None:
        self.config, self.track, self._device = config, track, device

    @cached_property
    def processes(self) -> Processes:
        """The processes that share the computation."""
        from megu_cli.execution.processes import processes

        return processes(self.config.device)

    @cached_property
    def device(self) -> torch.device:
        """Device of models and batches."""
        from megu_cli.execution.runtime import resolve_device

        return self._device or self.processes.device() or resolve_device(self.config.device)

    def start(self) -> None:
        """Set up this process for computing: deterministic algorithms, threads, and the precision of training steps.

        Call it before anything is computed. It may be called again.

        Raises:
            ConfigError: The device is not available.
        """
        from megu_cli.execution.runtime import deterministic, limit_threads, use_precision

        deterministic()
        limit_threads()
        use_precision(self.config.model.precision)
        _ = self.device
