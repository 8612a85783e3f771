"""The similarity backend that the config names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megu_cli.config import MLLMConfig
from megu_cli.execution.runtime import Track, silent
from megu_cli.mllm.base import Backend, Show

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Setup:
    """What a backend is made from; each takes what it needs.

    Attributes:
        settings: Of ``mllm``.
        ratings: Gives the file of recorded ratings.
        identity: Gives the digest of a local model.
        answers: File that keeps raw answers.
        show: A training image as it may be shown.
        device: Where a local model computes.
        track: Reports progress.
    """

    settings: MLLMConfig
    ratings: Callable[[], Path]
    identity: Callable[[], str]
    answers: Path
    show: Show
    device: torch.device
    track: Track = silent


def backend(setup: Setup) -> Backend:
    """The backend; no model is loaded and nothing is sent yet.

    Raises:
        DataError: The recorded ratings cannot be read.
    """
    module, _, name = setup.settings.rater.backend.partition(":")
    kind = getattr(importlib.import_module(f"megu_cli.mllm.{module}"), name)
    made: Backend = kind.of(setup)
    return made
