"""The inputs of a run: data set, forget request, model and rater; each is loaded once, when first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.config import Config, get
from megu_cli.models.user_model import UserModel
from megu_cli.pipeline import checks
from megu_cli.pipeline.directory import RunDirectory
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.original import OriginalModel
from megu_cli.pipeline.runtime import Runtime
from megu_cli.run import files

if TYPE_CHECKING:
    from PIL import Image

    from megu_cli.data import Dataset, Reserved
    from megu_cli.mllm.base import Backend, Cost, Question
    from megu_cli.request.earlier import EarlierRequests
    from megu_cli.request.resolve import Request


class Rater:
    """The similarity backend of a run and its siblings: made when first needed, and freed when its work is done."""

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        """The backend."""
        if self._backend is None:
            self._backend = self._make()
        return self._backend

    def free(self) -> None:
        """Free its memory."""
        self._backend = None


class RunInputs:
    """The inputs of a run.

    Args:
        config: The config.
        directory: The run directory.
        runtime: Where a rater computes.
        data: The data set, if it is loaded; ``None``: it is loaded when first needed. The same holds for the rest.
        request: The resolved forget request.
        earlier: The earlier requests.
        rater: The similarity backend.
        answers: The file of its raw answers; ``None``: the one in the run directory.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        runtime: Runtime,
        *,
        data: Dataset | None = None,
        request: Request | None = None,
        earlier: EarlierRequests | None = None,
        rater: Rater | None = None,
        answers: Path | None = None,
    ) -> None:
        self.answers = answers or directory.out / files.ANSWERS
        self.config, self.directory = config, directory
        self.user_model: UserModel = UserModel(config.model, config.data)
        self.original = self._original()
        self._runtime = runtime
        self._data, self._request, self._earlier = data, request, earlier
        self._rater = rater or Rater(self._backend)
        self._digests: dict[str, str] = {}

    def sibling(
        self, config: Config, directory: RunDirectory, runtime: Runtime, request: bool = True, data: bool = True
    ) -> RunInputs:
        """Return the inputs of another run; see `RunContext.sibling`."""
        earlier = None
        if not data:
            from megu_cli.request.earlier import EarlierRequests, recording

            # Positions, and draws, mean other images in other data.
            earlier = EarlierRequests.from_record(recording(self.data, self.earlier.resolved(self.data)))
        return RunInputs(
            config,
            directory,
            runtime,
            data=self.data if data else None,
            request=self.request if request else None,
            earlier=earlier,
            # The answers of one run directory are not asked for again in its siblings.
            rater=self._rater if data and config.mllm == self.config.mllm else None,
            answers=self.answers if data else None,
        )

    # -- the data and the request ----------------------------------------------------------------------------------

    @cached_property
    def data(self) -> Dataset:
        """The data set."""
        if self._data is not None:
            return self._data
        from megu_cli import data
        from megu_cli.models.sources import channels_of

        self.directory.input_memory.begin()
        settings, model = self.config.data, self.config.model
        loaded = data.load(
            settings,
            self.user_model.preprocessing,
            channels=channels_of(model.name, model.trust_remote_code),
            # Of a coarse-labelled set they name the superclasses: those are put in order below.
            order=self.user_model.classes if settings.source.users and settings.superclasses is None else None,
            reserved=self.reserved,
            file_digests=self.directory.file_digests,
        )
        return data.reordered(loaded, self.user_model.order_of(loaded.classes))

    @cached_property
    def earlier(self) -> EarlierRequests:
        """The earlier requests."""
        if self._earlier is not None:
            return self._earlier
        from megu_cli.request.earlier import EarlierRequests

        asked = self.config.forget
        return EarlierRequests(
            asked.already,
            self.user_model.checkpoint,
            self.config.data,
            out=self.directory.out,
            missing=asked.already_missing,
        )

    @property
    def reserved(self) -> Reserved:
        """The images of this and earlier requests: they never belong to a test split that megu makes."""
        from megu_cli.data import Reserved
        from megu_cli.request.deletion_list import paths_in

        asked, before = self.config.forget, self.earlier
        root = self.config.data.source.folder(self.config.data)
        lists = [asked.samples, *before.lists]
        return Reserved(
            frozenset(name for path in lists if path is not None for name in paths_in(path, root)),
            frozenset([*map(str, asked.subjects or []), *before.subjects]),
            frozenset(before.contents),
        )

    @cached_property
    def request(self) -> Request:
        """The forget request, resolved."""
        if self._request is not None:
            return self._request
        from megu_cli.request.resolve import asked, resolve

        earlier = self.earlier.resolved(self.data)
        return resolve(self.data, **asked(self.config.forget), earlier=earlier, seed=self.config.seed)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the request before it runs."""
        return self.directory.input_memory.fact("notes", lambda: checks.notes(self))

    @cached_property
    def eval_batch(self) -> int:
        """Samples per forward pass in predictions."""
        from megu_cli.training import eval_batch

        given = self.config.eval.batch
        return eval_batch(self.data.train.images[0].shape[-2:], self._runtime.device) if given == "auto" else given

    @property
    def without_images(self) -> list[int]:
        """The model's outputs without training images that are not to be forgotten."""

        def positions() -> list[int]:
            return self.request.without_images(self.data).nonzero().flatten().tolist()

        return self.directory.input_memory.fact("without_images", positions)

    # -- the ratings -----------------------------------------------------------------------------------------------

    @cached_property
    def questions(self) -> list[Question]:
        """The rows of ratings that the request needs, with the images that may be shown for them.

        Raises:
            DataError: ``mllm.images`` leaves no image of a concept.
        """
        from megu_cli.request.questions import questions

        settings = self.config.mllm
        if not self.config.takes_ratings:
            settings = settings.model_copy(update={"images": "none"})  # nobody is asked, and nothing is shown
        return questions(self.data, self.request, settings)

    @property
    def asked(self) -> list[Question]:
        """The questions with more than one candidate: otherwise the transition is certain."""
        return [question for question in self.questions if len(question.candidates) > 1]

    @property
    def rater(self) -> Backend:
        """The similarity backend."""
        return self._rater.backend

    def free_rater(self) -> None:
        """Free the memory of the similarity backend: the ratings are made."""
        self._rater.free()

    def _backend(self) -> Backend:
        from megu_cli.mllm.backends import Setup, backend

        return backend(
            Setup(
                self.config.mllm,
                ratings=lambda: self.ratings_file,
                identity=lambda: self.digest("rater_model"),
                answers=self.answers,
                show=self.picture,
                device=self._runtime.device,
                track=self._runtime.track,
            )
        )

    def picture(self, position: int) -> Image.Image:
        """Return a training image as it may be shown to a model."""
        from megu_cli.mllm.pictures import picture

        return picture(self.data.train.images[position], self.config.mllm.image_size)

    @property
    def ratings_file(self) -> Path:
        """Where the recorded ratings are."""
        from megu_cli.mllm.recorded import shipped

        # CIFAR-20 and other coarse sets are rated by their fine classes: the same file serves.
        return self.config.mllm.ratings or shipped(self.config.data.name)

    def rating_cost(self) -> Cost:
        """Return what the similarity ratings would take; nothing is sent."""
        return self.rater.cost(self.asked)

    # -- the model -------------------------------------------------------------------------------------------------

    def _original(self) -> OriginalModel:
        return OriginalModel(
            self.config.model, self.user_model, self.directory.out / files.ORIGINAL, data=lambda: self.data
        )

    def checkpoint_replaced(self) -> None:
        """Forget the loaded checkpoint: a stage has written another."""
        self.original = self._original()
        self._digests.pop("checkpoint", None)

    @property
    def unproven(self) -> bool:
        """True if the preflight must look at the checkpoint before it is used."""
        return self.config.model.preflight and self.user_model.foreign

    @property
    def wrapped(self) -> bool:
        """True if the user's checkpoint is more than a bare safetensors file."""
        path = self.user_model.checkpoint
        if path is None or path.is_dir() or path.suffix != ".safetensors":
            return path is not None
        return self.directory.input_memory.fact("wrapped", lambda: not self.original.file.bare)

    @property
    def unlearned_files(self) -> list[str]:
        """The files that the unlearned model may have beside model.safetensors, relative to the run directory."""
        path, folder, names = self.user_model.checkpoint, self.user_model.folder, []
        if folder:
            from megu_cli.models import huggingface

            names += [f"{files.UNLEARNED}/{name}" for name in huggingface.names_written(folder)]
        if path and not path.is_dir() and path.suffix != ".safetensors":
            names.append(f"{files.UNLEARNED}{path.suffix}")
        return names

    # -- the keys of the stages ------------------------------------------------------------------------------------

    def digest(self, name: str) -> str:
        """Return the content digest of an input that no stage makes, one of `inputs.INPUTS`.

        Raises:
            InputError: It is missing or at fault.
        """
        if name not in self._digests:
            row = INPUTS[name]

            def computed() -> str:
                return row.digest(self)

            # A checkpoint that a stage makes changes with that stage.
            remembered = row.applies(self)
            self._digests[name] = self.directory.input_memory.fact(name, computed) if remembered else computed()
        return self._digests[name]

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return resolved settings by dotted key, without those that came later and are at their default."""

        def unset(key: str) -> bool:
            section, _, name = key.partition(".")
            return bool(name) and name in getattr(self.config, section).unset

        def value(key: str) -> Any:
            if key == "model.name":
                return self.directory.input_memory.fact("architecture", lambda: self.user_model.architecture)
            return get(self.config, key)

        return {key: value(key) for key in keys if not unset(key)}
