"""What a run works on: config, data set, forget request, checkpoint; each loaded once, when first needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli import artifacts
from megu_cli.config import Config, ForgetConfig, get, load_config
from megu_cli.errors import ArtifactError, CheckpointError, ConfigError, DataError
from megu_cli.memo import Memo
from megu_cli.runtime import Track, silent

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from megu_cli.checkpoints import Checkpoint
    from megu_cli.data import Dataset, Reserved
    from megu_cli.forget import Earlier, Request
    from megu_cli.mllm.base import Backend, Cost, Question
    from megu_cli.models import Preprocessing, State
    from megu_cli.processes import Crew
    from megu_cli.resume import Resume

_MEMO = ".digests.npy"
_RUNS = "runs.jsonl"
# The unlearned checkpoint in the run directory: with a suffix a file, without one a directory of transformers.
UNLEARNED = "model"


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
        # Of the stage that is running.
        self.checkpoints: Resume | None = None
        self.memo = Memo(self.out / _MEMO)

    def sibling(self, config: Config, request: bool = True) -> Workspace:
        """A workspace for another seed, run directory or method settings on the same data, loaded once.

        Args:
            config: Its config; sections ``data`` and ``model.name`` are this one's.
            request: Keep this forget request, also where the config's seed would draw another.
        """
        other = Workspace(config, self.track)
        other._elder = self
        other.memo = self.memo
        other.__dict__["data"] = self.data
        other.__dict__["device"] = self.device
        if request:
            other.__dict__["request"] = self.request
        return other

    @cached_property
    def crew(self) -> Crew:
        """The processes that share the computation."""
        from megu_cli.processes import crew

        return crew(self.config.device)

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        from megu_cli.runtime import deterministic, resolve_device, use_precision

        deterministic()
        use_precision(self.config.model.precision)
        return self.crew.device() or resolve_device(self.config.device)

    @cached_property
    def data(self) -> Dataset:
        """The data set."""
        from megu_cli import data
        from megu_cli.models import channels_of

        settings, model, prepare = self.config.data, self.config.model, self.preprocessing
        loaded = data.load(
            settings.name,
            root=settings.root,
            superclasses=settings.superclasses,
            validation=settings.validation,
            limit=settings.limit,
            image_size=prepare.image_size,
            memory_limit=settings.memory_limit,
            workers=settings.workers,
            channels=channels_of(model.name, model.trust_remote_code),
            mean=prepare.mean,
            std=prepare.std,
            interpolation=prepare.interpolation,
            crop=prepare.crop,
            stretch=prepare.stretch,
            table=settings.manifest,
            # Of a coarse-labelled set they name the superclasses: those are put in order below.
            order=self._named_classes if settings.name not in data.SMALL and settings.superclasses is None else None,
            test_fraction=settings.test_fraction,
            follow_links=settings.follow_links,
            reserved=self._reserved,
            memo=self.memo,
        )
        return data.reordered(loaded, self._order_of(loaded.classes))

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared: as the config says, else the model, else (``None``) the data set."""
        from dataclasses import replace

        from megu_cli.data import SMALL
        from megu_cli.models import preprocessing_of

        settings, size = self.config.model, self.config.data.image_size
        own = preprocessing_of(settings.name, self.config.data.name not in SMALL, settings.trust_remote_code)
        if size is not None and size != own.image_size:
            own = replace(own, image_size=size, crop=1.0, stretch=False)
        if settings.mean is not None and settings.std is not None:
            own = replace(own, mean=tuple(settings.mean), std=tuple(settings.std))
        return own

    @cached_property
    def architecture(self) -> Any:
        """The model, and what is done to its input, in an artifact's key: plain data without paths."""
        from megu_cli.models import identity_of

        settings, own = self.config.model, self.preprocessing
        name = identity_of(settings.name, settings.trust_remote_code)
        # The size is part of the data's digest. Keys of models that need none of this stay as they were.
        more: dict[str, Any] = {}
        if own.mean is not None and own.std is not None:
            more = {"mean": list(own.mean), "std": list(own.std)}
        if settings.precision != "auto":
            more["precision"] = settings.precision
        return {"model": name, **more} if more or not isinstance(name, str) else name

    @cached_property
    def _named_classes(self) -> list[str] | None:
        """The names in ``model.classes``."""
        from megu_cli.class_names import read_names

        given = self.config.model.classes
        return read_names(given) if isinstance(given, Path) else given

    def _order_of(self, classes: list[str]) -> list[int]:
        """For each output of the model the position of its class in the data."""
        from megu_cli.class_names import match

        settings = self.config.model
        if self._named_classes is not None:
            return match(self._named_classes, classes, "model.classes", exact=True)
        if folder := self.hf_folder:
            from megu_cli import huggingface

            labels = huggingface.class_names(str(folder), settings.trust_remote_code)
            # Where there is nothing but a config, its names are kept if they fit.
            if labels and (huggingface.has_weights(folder) or sorted(labels) == sorted(classes)):
                return match(labels, classes, f"id2label of hf:{folder.name}")
        return list(range(len(classes)))

    @cached_property
    def hf_folder(self) -> Path | None:
        """The directory of a ``hf:`` model."""
        name = self.config.model.name
        if not name.startswith("hf:"):
            return None
        from megu_cli.huggingface import folder_of

        return folder_of(name.removeprefix("hf:"))

    @cached_property
    def own_checkpoint(self) -> Path | None:
        """The user's trained weights: a file, or a directory of transformers; ``None``: `megu train` makes them."""
        given, folder = self.config.model.checkpoint, self.hf_folder
        if folder is None:
            return given
        from megu_cli.huggingface import has_weights

        if given is None:
            return folder if has_weights(folder) else None
        # transformers may rename what is in such a file while it reads its directory.
        whole = not given.is_dir() and has_weights(given.parent) and (given.parent / "config.json").is_file()
        return given.parent if whole and given.name in ("model.safetensors", "pytorch_model.bin") else given

    @property
    def _reserved(self) -> Reserved:
        """What the request names, and what was forgotten before: never part of a test split that megu makes."""
        from megu_cli.data import Reserved
        from megu_cli.forget import paths_in

        asked = self.config.forget
        lists = [asked.samples, *(path for path in asked.already or [] if path.suffix == ".csv")]
        return Reserved(
            frozenset(name for path in lists if path is not None for name in paths_in(path)),
            frozenset(map(str, asked.subjects or [])),
            frozenset(content for _, contents in self._records for content in contents),
        )

    @cached_property
    def _records(self) -> list[tuple[list[str], list[int]]]:
        """(concepts, contents of images) that earlier runs named by ``forget.already`` have forgotten.

        Raises:
            ConfigError: The checkpoint comes from a run directory that is not named.
            DataError: There is no record of what was forgotten.
        """
        from megu_cli.forget import recorded

        given, own = self.config.forget.already, self.own_checkpoint
        # model.safetensors, model.pth (or whichever suffix the first checkpoint had), the directory model/.
        unlearned = own is not None and own.stem == UNLEARNED and (own.parent / "finetune.json").is_file()
        if given is None and own is not None and unlearned:
            raise ConfigError(
                f"the checkpoint {own} was unlearned before, and forget.already does not say what it has forgotten",
                f"Set forget.already to [{own.parent}], or to [] if that may be learned again.",
            )
        return [
            recorded(artifacts.read(folder / "finetune.json").body.get("forgotten"), str(folder))
            for folder in given or []
            if folder.suffix not in (".csv", ".yaml", ".yml")
        ]

    def _earlier(self) -> Earlier:
        """What was forgotten before, as the run directories, lists and configs of ``forget.already`` say."""
        from megu_cli.forget import Earlier, resolve

        result = Earlier()
        for concepts, contents in self._records:
            result = result.joined(Earlier.of(self.data, concepts, contents))
        for path in self.config.forget.already or []:
            if path.suffix == ".csv":
                result = result.joined(Earlier.listed(self.data, path))
            elif path.suffix in (".yaml", ".yml"):
                config = load_config(path)
                then = resolve(self.data, **_asked(config.forget), seed=config.seed)
                result = result.joined(Earlier(then.forget, then.concepts))
        return result

    @cached_property
    def request(self) -> Request:
        """The forget request, resolved."""
        from megu_cli.forget import resolve

        asked = _asked(self.config.forget)
        return resolve(self.data, **asked, earlier=self._earlier(), seed=self.config.seed)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the request before it runs."""
        from megu_cli.forget import notes

        lines = notes(self.data, self.request, self.config.forget.duplicates)
        if self.data.test_made and self.foreign:
            lines.append(
                "the test split was made here (data.test_fraction): if the checkpoint was trained on its images too, "
                "figures on test images flatter, and membership attacks see no difference"
            )
        return lines

    @cached_property
    def questions(self) -> list[Question]:
        """The rows of ratings that the request needs, with the images that may be shown for them.

        Raises:
            DataError: ``mllm.images`` leaves no image of a concept.
        """
        from megu_cli.mllm.base import Question

        names, gone = self.data.concepts, set(self.request.concepts)
        return [
            Question(names[c], [n for k, n in enumerate(names) if k != c and k not in gone], self._shown(c))
            for c in self.request.asked
        ]

    def _shown(self, concept: int) -> list[int]:
        """Positions of the images of a concept that a model is shown."""
        import torch

        from megu_cli.data import sampled

        settings = self.config.mllm
        if settings.backend == "recorded" or settings.images == "none":
            return []
        shown = self.data.train.concepts == concept
        if settings.images == "retain-only" or concept not in self.request.concepts:
            shown[self.request.forget] = False
        positions = torch.where(shown)[0].tolist()
        if not positions:
            raise DataError(
                f"mllm.images: {settings.images} leaves no image of {self.data.concepts[concept]} to show",
                "All of its training images are to be forgotten. Set mllm.images to none, to rate by name alone"
                + (", or to auto." if concept in self.request.concepts else "."),
            )
        return sampled(self.data.train, positions, settings.images_per_class)

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
            identity=lambda: self._rater_model_digest,
            answers=self.out / "similarity.answers.jsonl",
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
        from megu_cli.models import build

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
        from megu_cli.checkpoints import read

        return read(self.checkpoint_file, self.build(), self.config.model.key if self.own_checkpoint else None)

    @cached_property
    def _directory(self) -> State:
        from megu_cli.huggingface import read

        if not self.hf_folder:
            raise CheckpointError(
                f"model.checkpoint: {self.checkpoint_file} is a directory", "Name a file, or use model.name: hf:DIR."
            )
        return read(self.checkpoint_file, len(self.data.classes), self.config.model.trust_remote_code)

    @property
    def checkpoint_file(self) -> Path:
        """The user's checkpoint, or the one that `megu train` writes."""
        return self.own_checkpoint or self.out / "original.safetensors"

    def unlearned(self, out: Path | None = None) -> nn.Module:
        """The unlearned model of a run directory (this one's), in eval mode.

        Raises:
            CheckpointError: It cannot be read or does not fit.
        """
        from megu_cli import huggingface
        from megu_cli.checkpoints import read

        folder = out or self.out
        if self.hf_folder:  # as from_pretrained() gives it to the user
            state = huggingface.read(folder / UNLEARNED, len(self.data.classes), self.config.model.trust_remote_code)
            return self.load(state, UNLEARNED)
        path = folder / "model.safetensors"
        key = self.file.chosen.name if self.own_checkpoint and self.file.suffix == path.suffix else ""
        return self.load(read(path, self.build(), key or None).state, path.name)

    def original(self) -> nn.Module:
        """A new copy of the original model, in eval mode.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit.
        """
        return self.load(self.checkpoint, self.checkpoint_file.name)

    def load(self, state: State, source: str) -> nn.Module:
        """A model with the given weights, in eval mode on the device."""
        from megu_cli.models import load_state

        return load_state(self.build(), state, source).eval()

    @property
    def foreign(self) -> bool:
        """Whether the checkpoint is there and not one that `megu train` made: what it was trained on is not known."""
        own = self.own_checkpoint
        if own is None or not own.exists():
            return False
        return own.is_dir() or own.suffix != ".safetensors" or not artifacts.is_ours(own)

    @property
    def unproven(self) -> bool:
        """Whether the checkpoint is to be looked into before it is used."""
        return self.config.model.preflight and self.foreign

    def preflight(self) -> str:
        """See that the original model classifies the data; what was found, in a line.

        Raises:
            CheckpointError: It does not; the likeliest cause is named.
        """
        from megu_cli import preflight
        from megu_cli.data import NORMALISATION

        return preflight.check(
            self.original(),
            self.data.train,
            self.data.classes,
            expected=self.config.model.expected_accuracy,
            own=NORMALISATION.get(self.config.data.name),
            device=self.device,
        )

    def check(self) -> None:
        """Resolve data set and request, so that what is at fault in them is said before anything is written."""
        from megu_cli.models import check_name, try_out

        check_name(self.config.model.name)
        for setting, own in (("model.checkpoint", self.own_checkpoint), ("model.name", self.hf_folder)):
            if own is not None and own.resolve().parent == self.out.resolve():
                raise ConfigError(
                    f"{setting} {own.name} lies in the run directory, where megu writes",
                    "Move it elsewhere, or give another run directory with -o.",
                )
        _ = self.device, self.request, self.questions
        pixels = self.data.train.images[0]
        try_out(self.build(), (self.data.channels, *pixels.shape[1:]), len(self.data.classes))

    def preload(self) -> None:
        """Load what several stages share, so that the time of a stage is its own."""
        _ = self.data, self.request, self.device
        if self.checkpoint_file.exists():
            _ = self.checkpoint

    def forget_loaded(self, stage: str) -> None:
        """Drop what a stage has just replaced on disk, or what only that stage needs."""
        if stage == "train":
            for name in ("file", "_directory", "_checkpoint_digest"):
                self.__dict__.pop(name, None)
        if stage == "similarity":
            # Its work is done, and a local model's memory is wanted by what follows.
            self.__dict__.pop("rater", None)
            if self._elder:
                self._elder.forget_loaded(stage)

    def digest(self, name: str) -> str:
        """Content digest of an input that no stage makes.

        These are train_data, test_data, forget, concepts, ratings, prompt, rater_model and checkpoint.

        Raises:
            InputError: It is missing or at fault.
        """
        return str(getattr(self, f"_{name}_digest"))

    @cached_property
    def _train_data_digest(self) -> str:
        return self.data.train.digest

    @cached_property
    def _test_data_digest(self) -> str:
        return self.data.test.digest

    @cached_property
    def _forget_digest(self) -> str:
        return self.request.digest

    @cached_property
    def _concepts_digest(self) -> str:
        asked = [[q.concept, q.candidates] for q in self.questions]
        return artifacts.digest([asked, self.data.concept_class.tolist(), self.request.kind])

    @cached_property
    def _ratings_digest(self) -> str:
        from megu_cli.mllm.recorded import Recorded

        if not self.ratings_file.is_file():
            raise DataError(f"no recorded ratings at {self.ratings_file}", "Set mllm.ratings to a file that is there.")
        Recorded(self.ratings_file).rate(self.questions)  # a rating that is missing shows before anything runs
        return self.file_digests([self.ratings_file])[0]

    @cached_property
    def _prompt_digest(self) -> str:
        from megu_cli.mllm import base

        return artifacts.digest(["prompt", base.PROMPT_VERSION])

    @cached_property
    def _rater_model_digest(self) -> str:
        settings = self.config.mllm
        if isinstance(settings.model, str):
            return artifacts.digest([settings.model, settings.revision])
        folder = settings.model
        found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))} if folder else {}
        # Hidden files belong to the tools that fetched the model.
        files = {n: p for n, p in found.items() if p.is_file() and not any(part[0] == "." for part in n.parts)}
        if not files:
            raise DataError(f"mllm.model: {folder} is no directory of a model")
        return artifacts.digest([[name.as_posix() for name in files], self.file_digests(list(files.values()))])

    @cached_property
    def _checkpoint_digest(self) -> str:
        path = self.checkpoint_file
        if not path.exists():
            raise CheckpointError(f"no checkpoint at {path}", "Set model.checkpoint, or make one with `megu train`.")
        # Weights are digested as tensors, so that a .pth file and its safetensors twin are the same input. Fitting
        # them now means that a wrong checkpoint is refused before any stage has run.
        self.original()
        return artifacts.state_digest(self.checkpoint)

    @cached_property
    def _wrapping_digest(self) -> str:
        """Of all that the user's file or directory has beside the weights: it is written beside the unlearned ones."""
        if self.checkpoint_file.is_dir():
            from megu_cli.huggingface import names_in_file

            return artifacts.digest(names_in_file(self.checkpoint_file))
        return artifacts.digest(self.file.described)

    @property
    def wrapped(self) -> bool:
        """Whether the user's checkpoint is more than a bare safetensors file."""
        own = self.own_checkpoint
        return own is not None and (own.is_dir() or own.suffix != ".safetensors" or not self.file.bare)

    def file_digests(self, files: Sequence[Path]) -> list[str]:
        """sha256 of each file, remembered by path, size and time of change."""
        return [bytes(digest).hex() for digest in self.memo.digests(map(str, files))]

    def keep_memo(self, only_beside_runs: bool = False) -> None:
        """Write the remembered digests to the run directory, where they changed.

        Args:
            only_beside_runs: Do so only where something ran before, and never fail: for commands that write nothing
                else, and would read gigabytes of weights again each time.
        """
        if only_beside_runs and not (self.out / _RUNS).is_file():
            return
        try:
            self.memo.keep()
        except ArtifactError:
            if not only_beside_runs:
                raise

    def log_run(self, entry: dict[str, Any]) -> None:
        """Append to runs.jsonl what depends on the moment: time, device, seconds."""
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / _RUNS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def seconds(self, fingerprint: str) -> tuple[float, str] | None:
        """Seconds that the artifact with this fingerprint last took, and on which machine; ``None`` if not known."""
        entry = self.logged(fingerprint)
        return (float(entry["seconds"]), str(entry["machine"])) if entry else None

    def logged(self, fingerprint: str) -> dict[str, Any] | None:
        """The last entry of runs.jsonl for the artifact with this fingerprint."""
        try:
            lines = (self.out / _RUNS).read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        for line in reversed(lines):
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:  # a line cut short by a kill
                continue
            if entry.get("fingerprint") == fingerprint:
                return entry
        return None

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """Resolved settings by dotted key."""
        return {key: self.architecture if key == "model.name" else get(self.config, key) for key in keys}


def _asked(forget: ForgetConfig) -> dict[str, Any]:
    """The arguments of `forget.resolve` that a request gives."""
    share = forget.random
    return {
        "classes": forget.classes,
        "subclasses": forget.subclasses,
        "samples": forget.samples,
        "subjects": forget.subjects,
        "fraction": share.fraction if share else None,
        "count": share.count if share else None,
        "copies": forget.duplicates == "include",
    }
