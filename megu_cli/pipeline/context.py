"""One run as the stages see it: the run directory, the inputs, and where and how to compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megu_cli.config import Config
from megu_cli.errors import ConfigError
from megu_cli.execution import Execution, ResumePoint
from megu_cli.execution.runtime import Track, silent
from megu_cli.pipeline import checks
from megu_cli.pipeline.directory import RunDirectory
from megu_cli.pipeline.run_inputs import RunInputs
from megu_cli.pipeline.runtime import Runtime
from megu_cli.run import files

if TYPE_CHECKING:
    from torch import nn

    from megu_cli.models.weights import State


@dataclass
class RunContext:
    """One run. Make it with `open`, or from another run with `sibling`.

    Attributes:
        config: The config. It differs from that of ``inputs`` at most in settings that no stage depends on.
        directory: The run directory.
        inputs: Data, request, model and rater.
        runtime: Device, precision, processes and progress.
        resume: Saves the state of a training, for the stage that is running.
        unchecked: True if `check` was left out, since the inputs passed it in an earlier command.
    """

    config: Config
    directory: RunDirectory
    inputs: RunInputs
    runtime: Runtime
    resume: ResumePoint | None = None
    unchecked: bool = False

    @classmethod
    def open(cls, config: Config, track: Track = silent) -> RunContext:
        """Return the run of a config. Nothing is read yet, and no state of the process is set."""
        directory, runtime = RunDirectory(config), Runtime(config, track)
        return cls(config, directory, RunInputs(config, directory, runtime), runtime)

    def sibling(self, config: Config, request: bool = True, data: bool = True) -> RunContext:
        """Return the run of another seed, run directory or method settings on the same data, loaded once.

        Args:
            config: Its config; sections ``data`` and ``model.name`` are this one's.
            request: Keep this forget request, even if the config's seed would draw another.
            data: Keep the data, and who rates them; otherwise the config may name another ``data.limit``.
        """
        directory = RunDirectory(config, self.directory.file_digests, remembers=False)
        runtime = Runtime(config, self.runtime.track, self.runtime.device)
        inputs = self.inputs.sibling(config, directory, runtime, request=request, data=data)
        return RunContext(config, directory, inputs, runtime)

    @property
    def execution(self) -> Execution:
        """Where and how the computations of this run happen."""
        return Execution(
            device=self.runtime.device,
            seed=self.config.seed,
            eval_batch=self.inputs.eval_batch,
            processes=self.runtime.processes,
            track=self.runtime.track,
            resume=self.resume,
        )

    # -- models on the device --------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """Return a newly initialised model on the device; it draws from torch's global random state."""
        return self.inputs.original.network().to(self.runtime.device)

    def load(self, state: State, source: str) -> nn.Module:
        """Return a model with the given weights, in eval mode on the device."""
        from megu_cli.models.weights import load_state

        return load_state(self.build(), state, source).eval()

    def original(self) -> nn.Module:
        """Return a new copy of the original model, in eval mode.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit.
        """
        return self.load(self.inputs.original.weights, self.inputs.original.path.name)

    def unlearned(self, out: Path | None = None) -> nn.Module:
        """Return the unlearned model of a run directory (this one's), in eval mode.

        Raises:
            CheckpointError: It cannot be read or does not fit.
        """
        from megu_cli.models import huggingface
        from megu_cli.models.checkpoints import read

        folder, inputs = out or self.directory.out, self.inputs
        if inputs.user_model.folder:  # as from_pretrained() gives it to the user
            state = huggingface.read(
                folder / files.UNLEARNED, len(inputs.data.classes), self.config.model.trust_remote_code
            )
            return self.load(state, files.UNLEARNED)
        path, file = folder / files.WEIGHTS, inputs.original.file if inputs.user_model.checkpoint else None
        key = file.chosen.name if file and file.suffix == path.suffix else None
        return self.load(read(path, inputs.original.network(), key or None).state, path.name)

    # -- before the stages -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Resolve data set and request, so that errors in them are reported before anything is written.

        Inputs that passed before, and have not changed since, are checked only if a stage runs; see `ready`.
        """
        user_model = self.inputs.user_model
        given = {
            "model.checkpoint": user_model.checkpoint,
            "model.name": user_model.folder,
            "eval.oracle": self.config.eval.own_oracle,
        }
        for setting, path in given.items():
            if path is not None and path.resolve().parent == self.directory.out.resolve():
                raise ConfigError(
                    f"{setting} {path.name} lies in the run directory, where megu writes",
                    "Move it elsewhere, or give another run directory with -o.",
                )
        memory = self.directory.input_memory
        self.unchecked = "checked" in memory.begin()
        if not self.unchecked:
            memory.fact("checked", lambda: checks.passes(self))

    def ready(self) -> None:
        """Make up for a `check` that was left out; call it before a stage runs."""
        if self.unchecked:
            self.unchecked = not checks.passes(self)

    def preload(self) -> None:
        """Load what several stages share, so that the time of a stage is its own."""
        _ = self.inputs.data, self.inputs.request, self.runtime.device
        if self.inputs.original.path.exists():
            _ = self.inputs.original.weights
