"""The inputs that no stage makes: each one with its content digest, which is part of a stage's key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megu_cli.config.model_sources import source_of
from megu_cli.errors import CheckpointError, DataError
from megu_cli.models.user_model import UserModel
from megu_cli.run import artifacts, files
from megu_cli.run.file_digests import FileDigestCache
from megu_cli.run.trees import Unknown, below

if TYPE_CHECKING:
    from megu_cli.config import Config
    from megu_cli.mllm.recorded import Recorded
    from megu_cli.pipeline.run_inputs import RunInputs


def _train_data(inputs: RunInputs) -> str:
    return inputs.data.digest


def _test_data(inputs: RunInputs) -> str:
    return inputs.data.test.digest


def _forget(inputs: RunInputs) -> str:
    return inputs.request.digest


def _concepts(inputs: RunInputs) -> str:
    asked = [[q.concept, q.candidates] for q in inputs.questions]
    return artifacts.digest([asked, inputs.data.concept_class.tolist(), inputs.request.kind])


def recorded(inputs: RunInputs) -> Recorded:
    """The recorded ratings.

    Raises:
        DataError: They are missing, or cannot be read.
    """
    from megu_cli.mllm.recorded import Recorded

    if not inputs.ratings_file.exists():
        raise DataError(f"no recorded ratings at {inputs.ratings_file}", "Set mllm.ratings to a file that is there.")
    return Recorded(inputs.ratings_file)


def _ratings(inputs: RunInputs) -> str:
    recorded(inputs).rate(inputs.questions)  # a rating that is missing shows before anything runs
    return _files([inputs.ratings_file], inputs.directory.file_digests)[0]


def _prompt(inputs: RunInputs) -> str:
    from megu_cli.mllm import base

    return artifacts.digest(["prompt", base.PROMPT_VERSION])


def _rater_model(inputs: RunInputs) -> str:
    settings = inputs.config.mllm
    if isinstance(settings.model, str):
        return artifacts.digest([settings.model, settings.revision])
    folder = settings.model
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))} if folder else {}
    # Hidden files belong to the tools that fetched the model.
    parts = {n: p for n, p in found.items() if p.is_file() and not any(part[0] == "." for part in n.parts)}
    if not parts:
        raise DataError(f"mllm.model: {folder} is no directory of a model")
    return artifacts.digest(
        [[name.as_posix() for name in parts], _files(list(parts.values()), inputs.directory.file_digests)]
    )


def _checkpoint(inputs: RunInputs) -> str:
    from megu_cli.models.weights import load_state

    path = inputs.original.path
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}", "Set model.checkpoint, or make one with `megu train`.")
    # Weights are digested as tensors, so that a .pth file and its safetensors twin are the same input. Fitting
    # them now means that a wrong checkpoint is refused before any stage has run.
    load_state(inputs.original.network(), inputs.original.weights, path.name)
    return artifacts.state_digest(inputs.original.weights)


def _wrapping(inputs: RunInputs) -> str:
    """Of all that the user's file or directory has beside the weights: it is written beside the unlearned ones."""
    if inputs.original.path.is_dir():
        from megu_cli.models.huggingface import names_in_file

        return artifacts.digest(names_in_file(inputs.original.path))
    return artifacts.digest(inputs.original.file.described)


def _outputs_without_images(inputs: RunInputs) -> str:
    return artifacts.digest(inputs.without_images)


def _distilled(inputs: RunInputs) -> bool:
    return inputs.config.finetune.distillation > 0 and bool(inputs.without_images)


def _has_own_oracle(inputs: RunInputs) -> bool:
    return inputs.config.eval.own_oracle is not None


def _retrained(inputs: RunInputs) -> str:
    from megu_cli.pipeline import retrained

    return retrained.digest(inputs)


def _files(paths: Sequence[Path], file_digests: FileDigestCache) -> list[str]:
    """sha256 of each file, remembered by path, size and time of change."""
    return [bytes(digest).hex() for digest in file_digests.digests(map(str, paths))]


def _no_files(config: Config) -> Iterator[Path]:
    return iter(())


def _data_files(config: Config) -> Iterator[str | Path]:
    return config.data.source.files(config.data, config.out)


def _request_files(config: Config) -> Iterator[Path]:
    if config.forget.samples:
        yield config.forget.samples
    for path in config.forget.already or []:
        if path.suffix in (".yaml", ".yml"):
            raise Unknown  # a config leads to other files
        yield path
        yield path / files.FINETUNE


def _ratings_files(config: Config) -> Iterator[Path]:
    if "ratings" in config.mllm.rater.inputs:
        from megu_cli.mllm.recorded import shipped

        yield config.mllm.ratings or shipped(config.data.name)


def _rater_files(config: Config) -> Iterator[str]:
    if isinstance(config.mllm.model, Path):
        yield from below(config.mllm.model, config.out)


def _model_files(config: Config) -> Iterator[str | Path]:
    if config.model.trust_remote_code:
        raise Unknown  # code that comes with the model may read anything
    source, name = source_of(config.model.name)
    yield from source.files(name, config.out)
    if isinstance(config.model.classes, Path):
        yield config.model.classes
    checkpoint = UserModel(config.model, config.data).checkpoint
    if checkpoint is not None:
        yield checkpoint
        if checkpoint.is_dir():
            yield from below(checkpoint, config.out)
        # Records of earlier requests may lie beside it.
        for folder in (config.out, checkpoint.parent, checkpoint.parent.parent):
            yield folder / files.FINETUNE


def _retrained_files(config: Config) -> Iterator[str | Path]:
    if oracle := config.eval.own_oracle:
        yield from below(oracle, config.out) if oracle.is_dir() else [oracle]


def _always(inputs: RunInputs) -> bool:
    return True


@dataclass(frozen=True)
class Input:
    """One kind of input that no stage makes.

    Attributes:
        name: Name of the input in a stage's key.
        words: What the user is told has changed.
        digest: Content digest; an input that is missing or at fault raises an InputError.
        applies: True if this run has the input.
        made_by: The stage that makes it if the user does not give it; empty: none.
        files: Called with the config; gives every file and folder that the digest is computed from, so that the digest
            can be remembered as long as none changes. It raises `Unknown` where there are others.
        checked_first: True if it can be checked by itself in a moment: `megu run` does so before it reads images.
    """

    name: str
    words: str
    digest: Callable[[RunInputs], str]
    applies: Callable[[RunInputs], bool] = _always
    made_by: str = ""
    files: Callable[[Config], Iterable[str | Path]] = _no_files
    checked_first: bool = False


_ROWS = (
    Input("train_data", "the training data", _train_data, files=_data_files),
    Input("test_data", "the test data", _test_data),
    Input("forget", "the forget request", _forget, files=_request_files),
    Input("concepts", "the classes asked about", _concepts),
    Input("ratings", "the recorded ratings", _ratings, files=_ratings_files, checked_first=True),
    Input("prompt", "the wording of the questions", _prompt),
    Input("rater_model", "the model that rates", _rater_model, files=_rater_files),
    Input(
        "checkpoint",
        "the checkpoint",
        _checkpoint,
        applies=lambda inputs: inputs.user_model.checkpoint is not None,
        made_by="train",
        files=_model_files,
    ),
    Input(
        "wrapping",
        "what stands beside the weights in the checkpoint",
        _wrapping,
        applies=lambda inputs: inputs.wrapped,
    ),
    Input(
        "outputs_without_images",
        "the outputs without images",
        _outputs_without_images,
        applies=_distilled,
    ),
    Input(
        "retrained",
        "your own retrained model",
        _retrained,
        applies=_has_own_oracle,
        made_by="oracle",
        files=_retrained_files,
    ),
)
INPUTS = {row.name: row for row in _ROWS}
