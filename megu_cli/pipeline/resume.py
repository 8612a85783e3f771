"""The checkpoint of a stage that is under way: a run that was killed goes on from it, to the same bytes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megu_cli.errors import ArtifactError
from megu_cli.run import artifacts
from megu_cli.run.artifacts import Artifact

# A checkpoint is not to cost more than a twentieth of the work that it saves.
_SHARE = 20
# What `training.fit` saves, as far as it is read before the model takes it.
_STATE = {
    **{"model": dict, "optimizer": dict, "scheduler": dict, "memory": dict},
    **{"done": int, "at": int, "draws": list, "losses": list, "scores": list},
}


class Resume:
    """Keeps what `training.fit` needs to go on, for one stage with one key; see `training.Checkpoints`.

    A checkpoint of another key, a damaged one and one of another kind are as good as none.

    Args:
        path: The file.
        fingerprint: Key of the stage.
        every: Seconds of work between two checkpoints.
        say: Told in a line that the work goes on.
    """

    def __init__(
        self, path: Path, fingerprint: str, every: float, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.path, self.fingerprint, self.every, self.say = path, fingerprint, every, say
        # Seconds of the work that is gone on with.
        self.seconds = 0.0
        self._started = self._last = time.perf_counter()
        self._cost = 0.0

    def load(self) -> dict[str, Any] | None:
        """What was last saved under this key; ``None`` where there is nothing."""
        import torch

        try:
            found = artifacts.read(self.path)
        except ArtifactError:
            return None
        if found.meta.get("stage") != "checkpoint" or found.meta.get("fingerprint") != self.fingerprint:
            return None
        try:
            state: dict[str, Any] = torch.load(
                io.BytesIO(found.tensors["state"].numpy().tobytes()), map_location="cpu", weights_only=True
            )
            seconds = float(found.body["seconds"])
            if not all(isinstance(state[name], kind) for name, kind in _STATE.items()):
                return None
        except Exception:  # damaged before it was sealed, or not ours: torch raises much
            return None
        self.seconds = seconds
        self.say(f"{self.path.stem}: goes on after {state['done']} steps ({self.seconds:.0f} s)")
        self._started = self._last = time.perf_counter()
        return state

    def due(self) -> bool:
        """Whether the interval is over."""
        return time.perf_counter() - self._last >= max(self.every, _SHARE * self._cost)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all."""
        import torch

        begun = time.perf_counter()
        stream = io.BytesIO()
        torch.save(state, stream)
        body = {"seconds": self.seconds + begun - self._started}
        tensors = {"state": torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)}
        meta = {"stage": "checkpoint", "fingerprint": self.fingerprint}
        artifacts.write(self.path, artifacts.seal(Artifact(body, tensors), meta))
        self._last = time.perf_counter()
        self._cost = self._last - begun
