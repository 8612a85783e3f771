"""The table of stages: for each one its function, files, settings and inputs.

The engine, the plan, the report, `megu purge` and `megu compare` read this table. A new stage is a row here and a
function in `megu_cli.pipeline.steps`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megu_cli.run import files

if TYPE_CHECKING:
    from megu_cli.config import Config
    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.run_inputs import RunInputs
    from megu_cli.pipeline.steps.product import Product
    from megu_cli.run.artifacts import Artifact

Names = tuple[str, ...]


def _none(config: Config) -> tuple[Names, Names]:
    return (), ()


def _no_files(inputs: RunInputs) -> Sequence[str]:
    return ()


def _nothing(inputs: RunInputs) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: Name of the stage in commands and artifacts.
        function: The function, as ``module:name`` in `megu_cli.pipeline.steps`; it is imported when the stage runs.
        file: The artifact. It is written last: if it is there, the stage is complete.
        command: The command that rebuilds the artifact.
        settings: Dotted config keys that the result depends on.
        inputs: Inputs that no stage makes; names in `megu_cli.pipeline.inputs.INPUTS`.
        needs: Stages whose artifacts it reads, in the order in which missing ones are made. An entry may also be an
            input that the user may give, such as the checkpoint: without it, the stage that makes it is needed.
        optional: Stages whose artifacts it reads if they are there. Such a stage is made for it only if the config
            asks for that stage; see ``switch``.
        by_config: Further settings and inputs that depend on the config.
        weights: Plain weight files that it writes beside the artifact.
        also_writes: Other files that it may write, relative to the run directory.
        switch: Boolean setting that asks for the stage; empty: the stage belongs to every run.
        goal: True if the artifact must be there at the end of `megu run`.
        group: Kind of work, for sums of seconds.
        done: Called with the inputs after the stage has run, to drop what it has replaced or no longer needs.
        version: Raised when the same inputs give another result.
        shared: True if several processes share the work; otherwise the first one does it and the others wait.
    """

    name: str
    function: str
    file: str
    command: str
    settings: Names
    inputs: Names
    needs: Names = ()
    optional: Names = ()
    by_config: Callable[[Config], tuple[Names, Names]] = _none
    weights: Names = ()
    also_writes: Callable[[RunInputs], Sequence[str]] = _no_files
    switch: str = ""
    goal: bool = False
    group: Literal["training", "ratings", "method", "evaluation"] = "training"
    done: Callable[[RunInputs], None] = _nothing
    version: int = 1
    shared: bool = False

    def load(self) -> Callable[[RunContext, Mapping[str, Artifact]], Product]:
        """Import the function that makes the artifact."""
        module, _, name = self.function.partition(":")
        function: Callable[[RunContext, Mapping[str, Artifact]], Product] = getattr(
            importlib.import_module(f"megu_cli.pipeline.steps.{module}"), name
        )
        return function


# mllm.backend -> settings and inputs that determine its ratings. Waiting times, concurrency and keys do not.
_RATING: dict[str, tuple[Names, Names]] = {
    "none": ((), ()),
    "recorded": ((), ("ratings",)),
    "endpoint": (("mllm.model", "mllm.base_url"), ("prompt",)),
    "local": (("mllm.dtype",), ("prompt", "rater_model")),
    "clip": (("mllm.dtype",), ("prompt", "rater_model")),
}
# The same for every backend that may be shown images.
_SHOWING: tuple[Names, Names] = (
    ("mllm.images", "mllm.images_per_class", "mllm.image_size"),
    ("train_data", "forget"),
)


def _rating(config: Config) -> tuple[Names, Names]:
    """Settings and inputs that determine the ratings of a config."""
    settings, inputs = _RATING[config.mllm.backend]
    if config.mllm.backend in ("none", "recorded"):
        return settings, inputs
    if config.mllm.images == "none":
        return (*settings, "mllm.images"), inputs
    return (*settings, *_SHOWING[0]), (*inputs, *_SHOWING[1])


def _judge(config: Config) -> tuple[Names, Names]:
    """The user's own retrained model is an input of the evaluation; one that megu trains is a stage."""
    return (), ("retrained",) if config.eval.own_oracle else ()


def _answers(inputs: RunInputs) -> Sequence[str]:
    return () if inputs.config.mllm.backend in ("none", "recorded") else (files.ANSWERS,)


def _unlearned(inputs: RunInputs) -> Sequence[str]:
    return inputs.unlearned_files


_TRAIN = ("seed", "model.name", "train")
# All of config.noise except the strength, which the finetuning uses.
_NOISE = tuple(f"noise.{key}" for key in ("use", "negative", "batch", "steps", "lr", "penalty"))
_REQUEST = ("train_data", "forget")
_ROWS = (
    Stage(
        name="train",
        function="train:train",
        file=files.ORIGINAL,
        command="megu train",
        settings=(*_TRAIN, "data.validation"),
        inputs=("train_data",),
        done=lambda inputs: inputs.checkpoint_replaced(),
        version=2,
        shared=True,
    ),
    Stage(
        name="oracle",
        function="train:oracle",
        file=files.ORACLE,
        command="megu train --retain-only",
        settings=_TRAIN,
        inputs=_REQUEST,
        switch="eval.oracle",
        version=2,
        shared=True,
    ),
    # The ratings come before any training: they may fail for reasons outside, such as a server or a key.
    Stage(
        name="similarity",
        function="similarity:similarity",
        file=files.SIMILARITY,
        command="megu similarity",
        settings=("mllm.backend",),
        inputs=("concepts",),
        by_config=_rating,
        also_writes=_answers,
        group="ratings",
        done=lambda inputs: inputs.free_rater(),
    ),
    Stage(
        name="transition",
        function="similarity:transition",
        file=files.TRANSITION,
        command="megu similarity",
        settings=("transition",),
        inputs=("concepts",),
        needs=("similarity",),
        group="ratings",
    ),
    Stage(
        name="labels",
        function="labels:labels",
        file=files.LABELS,
        command="megu labels",
        settings=("seed", "model.name", "labels"),
        inputs=_REQUEST,
        needs=("transition", "checkpoint"),
        group="method",
        version=6,
    ),
    Stage(
        name="noise",
        function="noise:noise",
        file=files.NOISE,
        command="megu noise",
        settings=("seed", "model.name", "finetune.batch", *_NOISE),
        inputs=_REQUEST,
        needs=("checkpoint", "labels"),
        group="method",
        version=2,
        shared=True,
    ),
    Stage(
        name="finetune",
        function="finetune:finetune",
        file=files.FINETUNE,
        command="megu finetune",
        settings=("seed", "model.name", "finetune", "labels.source", "noise.strength"),
        inputs=_REQUEST,
        needs=("transition", "checkpoint", "labels", "noise", "wrapping"),
        weights=(files.WEIGHTS,),
        also_writes=_unlearned,
        goal=True,
        group="method",
        version=12,
        shared=True,
    ),
    Stage(
        name="eval",
        function="evaluate:evaluate",
        file=files.EVALUATION,
        command="megu eval",
        settings=("seed", "model.name", "eval.attack_samples", "eval.probe_samples", "eval.relearn_epochs"),
        inputs=(*_REQUEST, "test_data"),
        needs=("checkpoint", "finetune"),
        optional=("labels", "oracle"),
        by_config=_judge,
        goal=True,
        group="evaluation",
        version=6,
        shared=True,
    ),
)
STAGES = {stage.name: stage for stage in _ROWS}


def in_group(*groups: str) -> list[str]:
    """Names of the stages of some kinds of work, in the order of the table."""
    return [stage.name for stage in _ROWS if stage.group in groups]
