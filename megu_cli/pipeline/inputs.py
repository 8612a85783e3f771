"""The inputs that no stage makes: each one with its content digest, which is part of a stage's key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megu_cli.errors import CheckpointError, DataError
from megu_cli.run import artifacts
from megu_cli.run.memo import Memo

if TYPE_CHECKING:
    from megu_cli.mllm.recorded import Recorded
    from megu_cli.pipeline.workspace import Workspace


def _train_data(work: Workspace) -> str:
    return work.data.digest


def _test_data(work: Workspace) -> str:
    return work.data.test.digest


def _forget(work: Workspace) -> str:
    return work.request.digest


def _concepts(work: Workspace) -> str:
    asked = [[q.concept, q.candidates] for q in work.questions]
    return artifacts.digest([asked, work.data.concept_class.tolist(), work.request.kind])


def recorded(work: Workspace) -> Recorded:
    """The recorded ratings.

    Raises:
        DataError: They are missing, or cannot be read.
    """
    from megu_cli.mllm.recorded import Recorded

    if not work.ratings_file.exists():
        raise DataError(f"no recorded ratings at {work.ratings_file}", "Set mllm.ratings to a file that is there.")
    return Recorded(work.ratings_file)


def _ratings(work: Workspace) -> str:
    recorded(work).rate(work.questions)  # a rating that is missing shows before anything runs
    return _files([work.ratings_file], work.memo)[0]


def _prompt(work: Workspace) -> str:
    from megu_cli.mllm import base

    return artifacts.digest(["prompt", base.PROMPT_VERSION])


def _rater_model(work: Workspace) -> str:
    settings = work.config.mllm
    if isinstance(settings.model, str):
        return artifacts.digest([settings.model, settings.revision])
    folder = settings.model
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))} if folder else {}
    # Hidden files belong to the tools that fetched the model.
    files = {n: p for n, p in found.items() if p.is_file() and not any(part[0] == "." for part in n.parts)}
    if not files:
        raise DataError(f"mllm.model: {folder} is no directory of a model")
    return artifacts.digest([[name.as_posix() for name in files], _files(list(files.values()), work.memo)])


def _checkpoint(work: Workspace) -> str:
    path = work.checkpoint_file
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}", "Set model.checkpoint, or make one with `megu train`.")
    # Weights are digested as tensors, so that a .pth file and its safetensors twin are the same input. Fitting
    # them now means that a wrong checkpoint is refused before any stage has run.
    work.original()
    return artifacts.state_digest(work.checkpoint)


def _wrapping(work: Workspace) -> str:
    """Of all that the user's file or directory has beside the weights: it is written beside the unlearned ones."""
    if work.checkpoint_file.is_dir():
        from megu_cli.models.huggingface import names_in_file

        return artifacts.digest(names_in_file(work.checkpoint_file))
    return artifacts.digest(work.file.described)


def _files(files: Sequence[Path], memo: Memo) -> list[str]:
    """sha256 of each file, remembered by path, size and time of change."""
    return [bytes(digest).hex() for digest in memo.digests(map(str, files))]


def _always(work: Workspace) -> bool:
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
        checked_first: True if it can be checked by itself in a moment: `megu run` does so before it reads images.
    """

    name: str
    words: str
    digest: Callable[[Workspace], str]
    applies: Callable[[Workspace], bool] = _always
    made_by: str = ""
    checked_first: bool = False


_ROWS = (
    Input("train_data", "the training data", _train_data),
    Input("test_data", "the test data", _test_data),
    Input("forget", "the forget request", _forget),
    Input("concepts", "the classes asked about", _concepts),
    Input("ratings", "the recorded ratings", _ratings, checked_first=True),
    Input("prompt", "the wording of the questions", _prompt),
    Input("rater_model", "the model that rates", _rater_model),
    Input(
        "checkpoint",
        "the checkpoint",
        _checkpoint,
        applies=lambda work: work.own_checkpoint is not None,
        made_by="train",
    ),
    Input(
        "wrapping",
        "what stands beside the weights in the checkpoint",
        _wrapping,
        applies=lambda work: work.wrapped,
    ),
)
INPUTS = {row.name: row for row in _ROWS}
