"""The similarity backend that the config names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megu_cli.config import MLLMConfig
from megu_cli.execution.runtime import Track, silent
from megu_cli.mllm.base import Backend, Show

if TYPE_CHECKING:
    import torch


def backend(
    settings: MLLMConfig,
    *,
    ratings: Callable[[], Path],
    identity: Callable[[], str],
    answers: Path,
    show: Show,
    device: torch.device,
    track: Track = silent,
) -> Backend:
    """The backend; nothing is loaded or sent yet.

    Args:
        settings: Of ``mllm``.
        ratings: Gives the file of recorded ratings; called only where they are used.
        identity: Gives the digest of a local model; called only where there is one.
        answers: File that keeps the raw answers of all other backends.
        show: A training image as it may be shown.
        device: Where a local model computes.
        track: Reports progress.

    Raises:
        DataError: The recorded ratings cannot be read.
    """
    if settings.backend == "none":
        from megu_cli.mllm.unrated import Unrated

        return Unrated()
    if settings.backend == "recorded":
        from megu_cli.mllm.recorded import Recorded

        return Recorded(ratings())
    from megu_cli.mllm.answers import Answers

    kept = Answers(answers)
    assert settings.model is not None  # the config has seen to it
    if settings.backend == "endpoint":
        from megu_cli.mllm.endpoint import Endpoint
        from megu_cli.mllm.masking import Key

        return Endpoint(
            str(settings.model),
            settings.base_url or "",
            key=Key(
                os.environ.get(settings.key_env, "").strip(),
                settings.key_env,
                needed=settings.key_env != MLLMConfig.model_fields["key_env"].default,
            ),
            allow_remote=settings.allow_remote,
            show=show,
            answers=kept,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            retries=settings.retries,
            track=track,
        )
    from megu_cli.mllm.clip import Clip
    from megu_cli.mllm.local import Local
    from megu_cli.mllm.pretrained import Looking, Pretrained

    source = Pretrained(
        settings.model,
        device,
        revision=settings.revision,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    asker = {"backend": settings.backend, "model": identity(), "dtype": settings.dtype}
    looking = Looking(show, kept, asker, track)
    return Local(source, looking) if settings.backend == "local" else Clip(source, looking)
