"""What a run works on: config, data set, forget request, checkpoint; each loaded once, when first needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.config import Config, get
from megu_cli.errors import ArtifactError, CheckpointError, ConfigError
from megu_cli.execution import Execution
from megu_cli.execution.runtime import Track, silent
from megu_cli.models.own import OwnModel
from megu_cli.pipeline import checks
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.remembered import InputMemory
from megu_cli.run import files
from megu_cli.run.log import RunLog
from megu_cli.run.memo import Memo

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from megu_cli.data import Dataset, Reserved
    from megu_cli.execution.processes import Processes
    from megu_cli.mllm.base import Backend, Cost, Question
    from megu_cli.models.checkpoints import Checkpoint
    from megu_cli.models.weights import State
    from megu_cli.pipeline.resume import Resume
    from megu_cli.request.earlier import Already
    from megu_cli.request.resolve import Request


class Workspace:
    """The inputs of all stages, and the run directory.

    Args:
        config: The validated configuration; its ``out`` is the run directory.
        track: Reports progress.
    """

    def __init__(self, config: Config, track: Track = silent) -> None:
        self.config = config
        self._elder: Workspace | None = None
        self.out = config.out
        self.track = track
        self.log = RunLog(self.out)
        self._digests: dict[str, str] = {}
        # Of the stage that is running.
        self.checkpoints: Resume | None = None
        self.memo = Memo(self.out / files.FILE_DIGESTS)
        self.known = InputMemory(config)
        self._unchecked = False

    def sibling(self, config: Config, request: bool = True, data: bool = True) -> Workspace:
        """A workspace for another seed, run directory or method settings on the same data, loaded once.

        Args:
            config: Its config; sections ``data`` and ``model.name`` are this one's.
            request: Keep this forget request, also where the config's seed would draw another.
            data: Keep the data, and who rates them; otherwise the config may name another ``data.limit``.
        """
        other = Workspace(config, self.track)
        other.memo = self.memo
        other.known = InputMemory(config, active=False)  # its request may not be the config's
        other.__dict__["device"] = self.device
        if data:
            other._elder = self
            other.__dict__["data"] = self.data
        else:
            from megu_cli.request.earlier import Already, recording

            # Positions, and draws, mean other images in other data.
            other.__dict__["already"] = Already.told(recording(self.data, self.already.resolved(self.data)))
        if request:
            other.__dict__["request"] = self.request
        return other

    @cached_property
    def crew(self) -> Processes:
        """The processes that share the computation."""
        from megu_cli.execution.processes import processes

        return processes(self.config.device)

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        from megu_cli.execution.runtime import deterministic, resolve_device, use_precision

        deterministic()
        use_precision(self.config.model.precision)
        return self.crew.device() or resolve_device(self.config.device)

    @cached_property
    def eval_batch(self) -> int:
        """Samples per forward pass where nothing is learned."""
        from megu_cli.training import eval_batch

        given = self.config.eval.batch
        return eval_batch(self.data.train.images[0].shape[-2:]) if given == "auto" else given

    @property
    def execution(self) -> Execution:
        """Where and how the computations of this run happen."""
        return Execution(
            device=self.device,
            seed=self.config.seed,
            eval_batch=self.eval_batch,
            processes=self.crew,
            track=self.track,
            resume=self.checkpoints,
        )

    @cached_property
    def data(self) -> Dataset:
        """The data set."""
        from megu_cli import data
        from megu_cli.models.sources import channels_of

        self.known.begin()
        settings, model = self.config.data, self.config.model
        loaded = data.load(
            settings,
            self.own.preprocessing,
            channels=channels_of(model.name, model.trust_remote_code),
            # Of a coarse-labelled set they name the superclasses: those are put in order below.
            order=self.own.classes if settings.name not in data.SMALL and settings.superclasses is None else None,
            reserved=self.reserved,
            memo=self.memo,
        )
        return data.reordered(loaded, self.own.order_of(loaded.classes))

    @cached_property
    def own(self) -> OwnModel:
        """The user's model, before its weights are read."""
        return OwnModel(self.config.model, self.config.data)

    @property
    def hf_folder(self) -> Path | None:
        """The directory of a ``hf:`` model."""
        return self.own.folder

    @property
    def own_checkpoint(self) -> Path | None:
        """The user's trained weights; ``None``: `megu train` makes them."""
        return self.own.checkpoint

    @cached_property
    def already(self) -> Already:
        """What was forgotten before."""
        from megu_cli.request.earlier import Already

        asked = self.config.forget
        return Already(
            asked.already, self.own_checkpoint, self.config.data, out=self.out, missing=asked.already_missing
        )

    @property
    def reserved(self) -> Reserved:
        """What the request names, and what was forgotten before: never part of a test split that megu makes."""
        from megu_cli.data import Reserved, folder_of
        from megu_cli.request.deletion_list import paths_in

        asked, before = self.config.forget, self.already
        root = folder_of(self.config.data)
        lists = [asked.samples, *before.lists]
        return Reserved(
            frozenset(name for path in lists if path is not None for name in paths_in(path, root)),
            frozenset([*map(str, asked.subjects or []), *before.subjects]),
            frozenset(before.contents),
        )

    @cached_property
    def request(self) -> Request:
        """The forget request, resolved."""
        from megu_cli.request.resolve import asked, resolve

        earlier = self.already.resolved(self.data)
        return resolve(self.data, **asked(self.config.forget), earlier=earlier, seed=self.config.seed)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the request before it runs."""
        return self.known.fact("notes", lambda: checks.notes(self))

    @cached_property
    def questions(self) -> list[Question]:
        """The rows of ratings that the request needs, with the images that may be shown for them.

        Raises:
            DataError: ``mllm.images`` leaves no image of a concept.
        """
        from megu_cli.request.questions import questions

        return questions(self.data, self.request, self.config.mllm)

    def picture(self, position: int) -> Image.Image:
        """A training image as it may be shown to a model."""
        from megu_cli.mllm.pictures import picture

        return picture(self.data.train.images[position], self.config.mllm.image_size)

    @cached_property
    def rater(self) -> Backend:
        """The similarity backend."""
        settings = self.config.mllm
        if self._elder and self._elder.config.mllm == settings:
            return self._elder.rater  # what was answered in one run directory is asked in none of its siblings
        from megu_cli.mllm.backends import backend

        return backend(
            settings,
            ratings=lambda: self.ratings_file,
            identity=lambda: self.digest("rater_model"),
            answers=self.out / files.ANSWERS,
            show=self.picture,
            device=self.device,
            track=self.track,
        )

    @property
    def ratings_file(self) -> Path:
        """Where the recorded ratings are."""
        from megu_cli.mllm.recorded import shipped

        settings = self.config
        # CIFAR-20 and other coarse sets are rated by their fine classes: the same file serves.
        return settings.mllm.ratings or shipped(settings.data.name)

    def rating_cost(self) -> Cost:
        """What the similarity ratings would take; nothing is sent."""
        return self.rater.cost([question for question in self.questions if len(question.candidates) > 1])

    def build(self) -> nn.Module:
        """A freshly initialised model of the configured kind, from torch's global random state, on the device."""
        from megu_cli.models.sources import build

        settings = self.config.model
        model = build(settings.name, len(self.data.classes), self.data.channels, settings.trust_remote_code)
        return model.to(self.device)

    @property
    def checkpoint(self) -> State:
        """The original model's weights, by the model's own names, in the file's dtypes.

        Raises:
            CheckpointError: They cannot be read.
        """
        return self._directory if self.checkpoint_file.is_dir() else self.file.state

    @cached_property
    def file(self) -> Checkpoint:
        """The original model's checkpoint file, taken apart.

        Raises:
            CheckpointError: It cannot be read.
        """
        from megu_cli.models.checkpoints import read

        self.known.begin()
        return read(self.checkpoint_file, self.build(), self.config.model.key if self.own_checkpoint else None)

    @cached_property
    def _directory(self) -> State:
        from megu_cli.models.huggingface import read

        self.known.begin()
        if not self.hf_folder:
            raise CheckpointError(
                f"model.checkpoint: {self.checkpoint_file} is a directory", "Name a file, or use model.name: hf:DIR."
            )
        return read(self.checkpoint_file, len(self.data.classes), self.config.model.trust_remote_code)

    @property
    def checkpoint_file(self) -> Path:
        """The user's checkpoint, or the one that `megu train` writes."""
        return self.own_checkpoint or self.out / files.ORIGINAL

    def unlearned(self, out: Path | None = None) -> nn.Module:
        """The unlearned model of a run directory (this one's), in eval mode.

        Raises:
            CheckpointError: It cannot be read or does not fit.
        """
        from megu_cli.models import huggingface
        from megu_cli.models.checkpoints import read

        folder = out or self.out
        if self.hf_folder:  # as from_pretrained() gives it to the user
            state = huggingface.read(
                folder / files.UNLEARNED, len(self.data.classes), self.config.model.trust_remote_code
            )
            return self.load(state, files.UNLEARNED)
        path = folder / files.WEIGHTS
        key = self.file.chosen.name if self.own_checkpoint and self.file.suffix == path.suffix else ""
        return self.load(read(path, self.build(), key or None).state, path.name)

    @property
    def unlearned_files(self) -> list[str]:
        """The files that the unlearned model may have beside model.safetensors, relative to the run directory."""
        own, names = self.own_checkpoint, []
        if self.hf_folder:
            from megu_cli.models import huggingface

            names += [f"{files.UNLEARNED}/{name}" for name in huggingface.names_written(self.hf_folder)]
        if own and not own.is_dir() and own.suffix != ".safetensors":
            names.append(f"{files.UNLEARNED}{own.suffix}")
        return names

    def original(self) -> nn.Module:
        """A new copy of the original model, in eval mode.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit.
        """
        return self.load(self.checkpoint, self.checkpoint_file.name)

    def load(self, state: State, source: str) -> nn.Module:
        """A model with the given weights, in eval mode on the device."""
        from megu_cli.models.weights import load_state

        return load_state(self.build(), state, source).eval()

    @property
    def unproven(self) -> bool:
        """Whether the checkpoint is to be looked into before it is used."""
        return self.config.model.preflight and self.own.foreign

    def check(self) -> None:
        """Resolve data set and request, so that what is at fault in them is said before anything is written.

        Inputs that passed before, and have not changed since, are looked at only if a stage runs; see `ready`.
        """
        for setting, own in (("model.checkpoint", self.own_checkpoint), ("model.name", self.hf_folder)):
            if own is not None and own.resolve().parent == self.out.resolve():
                raise ConfigError(
                    f"{setting} {own.name} lies in the run directory, where megu writes",
                    "Move it elsewhere, or give another run directory with -o.",
                )
        self._unchecked = "checked" in self.known.begin()
        if not self._unchecked:
            self.known.fact("checked", lambda: checks.passes(self))

    def ready(self) -> None:
        """Make up for a `check` that was left out; called before a stage runs."""
        if self._unchecked:
            self._unchecked = not checks.passes(self)

    def preload(self) -> None:
        """Load what several stages share, so that the time of a stage is its own."""
        _ = self.data, self.request, self.device
        if self.checkpoint_file.exists():
            _ = self.checkpoint

    def drop(self, name: str) -> None:
        """Drop the loaded ``checkpoint``, which a stage has replaced on disk, or the ``rater``, whose work is done."""
        for attribute in {"checkpoint": ("file", "_directory")}.get(name, (name,)):
            self.__dict__.pop(attribute, None)
        self._digests.pop(name, None)
        if name == "rater" and self._elder:
            self._elder.drop(name)

    def digest(self, name: str) -> str:
        """Content digest of an input that no stage makes, one of `digests.INPUTS`.

        Raises:
            InputError: It is missing or at fault.
        """
        if name not in self._digests:
            row = INPUTS[name]

            def computed() -> str:
                return row.digest(self)

            # A checkpoint that a stage makes changes with that stage.
            self._digests[name] = self.known.fact(name, computed) if row.applies(self) else computed()
        return self._digests[name]

    @property
    def wrapped(self) -> bool:
        """Whether the user's checkpoint is more than a bare safetensors file."""
        own = self.own_checkpoint
        if own is None or own.is_dir() or own.suffix != ".safetensors":
            return own is not None
        return self.known.fact("wrapped", lambda: not self.file.bare)

    def renew(self) -> None:
        """Read every input again; what was remembered of them is replaced."""
        self.memo.renew()
        self.known.forget()

    def keep_memo(self, only_beside_runs: bool = False) -> None:
        """Write the remembered digests to the run directory, where they changed.

        Args:
            only_beside_runs: Do so only where a run left some that were not purged, and never fail: for commands that
                write nothing else, and would read gigabytes of weights again each time.
        """
        if only_beside_runs and not any(
            (self.out / name).is_file() for name in (files.FILE_DIGESTS, files.INPUT_DIGESTS)
        ):
            return
        try:
            self.memo.keep()
            self.known.keep()
        except ArtifactError:
            if not only_beside_runs:
                raise

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """Resolved settings by dotted key."""

        def value(key: str) -> Any:
            if key == "model.name":
                return self.known.fact("architecture", lambda: self.own.architecture)
            return get(self.config, key)

        return {key: value(key) for key in keys}
