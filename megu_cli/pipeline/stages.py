"""The table of stages: for each one its function, files, settings and inputs.

The engine, the plan, the report, `megu purge` and `megu compare` read this table. A new stage is a row here and a
module in `megu_cli.pipeline.steps` with its function and its estimate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megu_cli.evaluation import catalogue
from megu_cli.run import files

if TYPE_CHECKING:
    from megu_cli.config import Config
    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.rehearsal import Estimate, Rehearsal
    from megu_cli.pipeline.run_inputs import RunInputs
    from megu_cli.pipeline.steps.product import Product
    from megu_cli.run.artifacts import Artifact

Names = tuple[str, ...]


def _none(config: Config) -> tuple[Names, Names]:
    return (), ()


def _always(config: Config) -> bool:
    return True


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
        estimate: The function that estimates what the stage takes, named in the same way; for ``--dry-run``.
        file: The artifact. It is written last: if it is there, the stage is complete.
        command: The command that rebuilds the artifact.
        settings: Dotted config keys that the result depends on.
        body: Form of the artifact's body; see `megu_cli.pipeline.bodies`.
        inputs: Inputs that no stage makes; names in `megu_cli.pipeline.inputs.INPUTS`.
        needs: Stages whose artifacts it reads, in the order in which missing ones are made. An entry may also be an
            input that the user may give, such as the checkpoint: without it, the stage that makes it is needed.
        optional: Stages whose artifacts it reads if they are there. Such a stage is made for it only if the config
            asks for that stage; see ``switch``.
        by_config: Further settings and inputs that depend on the config.
        weights: Plain weight files that it writes beside the artifact.
        required: Keys of the body that a later stage cannot do without.
        traces: File -> what it holds of the forgotten data, in words: `megu purge` deletes these files.
        purged_on_request: File -> what it holds, in words: `megu purge` deletes it only if an option names it.
        also_writes: Other files that it may write, relative to the run directory.
        switch: Boolean setting that asks for the stage; empty: the stage belongs to every run.
        goal: True if the artifact must be there at the end of `megu run`.
        group: Kind of work, for sums of seconds.
        done: Called with the inputs after the stage has run, to drop what it has replaced or no longer needs.
        version: Raised when the same inputs give another result.
        shared: True if several processes share the work; otherwise the first one does it and the others wait.
        method: The setting ``method`` that the row is for; empty: any.
        applies: True if the row is for a config. Several rows may describe one stage, each for configs of its own.
    """

    name: str
    function: str
    estimate: str
    file: str
    command: str
    settings: Names
    inputs: Names
    body: Mapping[Any, Any]
    needs: Names = ()
    optional: Names = ()
    by_config: Callable[[Config], tuple[Names, Names]] = _none
    weights: Names = ()
    required: Names = ()
    traces: Mapping[str, str] = field(default_factory=dict)
    purged_on_request: Mapping[str, str] = field(default_factory=dict)
    also_writes: Callable[[RunInputs], Sequence[str]] = _no_files
    switch: str = ""
    goal: bool = False
    group: Literal["training", "ratings", "method", "evaluation"] = "training"
    done: Callable[[RunInputs], None] = _nothing
    version: int = 1
    shared: bool = False
    method: Literal["", "megu", "retrain"] = ""
    applies: Callable[[Config], bool] = _always

    def load(self) -> Callable[[RunContext, Mapping[str, Artifact]], Product]:
        """Import the function that makes the artifact."""
        function: Callable[[RunContext, Mapping[str, Artifact]], Product] = _step(self.function)
        return function

    def load_estimate(self) -> Callable[[Rehearsal], Estimate]:
        """Import the function that estimates what the stage takes."""
        function: Callable[[Rehearsal], Estimate] = _step(self.estimate)
        return function


def _step(place: str) -> Any:
    """Import what ``module:name`` names in `megu_cli.pipeline.steps`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"megu_cli.pipeline.steps.{module}"), name)


def _rating(config: Config) -> tuple[Names, Names]:
    """Settings and inputs that determine the ratings of a config."""
    return config.mllm.rater.depends_on(config.mllm.images)


def _judge(config: Config) -> tuple[Names, Names]:
    """The user's own retrained model is an input of the evaluation; one that megu trains is a stage."""
    return (), ("retrained",) if config.eval.own_oracle else ()


def _answers(inputs: RunInputs) -> Sequence[str]:
    return (files.ANSWERS,) if inputs.config.mllm.rater.asks else ()


def _unlearned(inputs: RunInputs) -> Sequence[str]:
    return inputs.unlearned_files


_TRAIN = ("seed", "model.name", "train")
# All of config.noise except the strength, which the finetuning uses.
_NOISE = tuple(f"noise.{key}" for key in ("use", "negative", "input", "batch", "steps", "lr", "penalty"))
_REQUEST = ("train_data", "forget")
# Parts of the bodies' forms.
_NUMBER = (int, float)
_TRAINING = {"classes": [str], "loss": [_NUMBER], "validation_acc": [_NUMBER], "samples": int}
_TRANSITION = {"rows": [str], "columns": [str]}
_UNLEARNED = {
    "loss": [_NUMBER],
    "validation_acc": [_NUMBER],
    "steps": int,
    "forgotten": {"concepts": [str], "images": [str]},
}
_MODELS = ("original", "mask", "unlearned", "oracle")
_ROWS = (
    Stage(
        name="train",
        function="train:train",
        estimate="train:train_estimate",
        file=files.ORIGINAL,
        command="megu train",
        settings=(*_TRAIN, "data.validation"),
        inputs=("train_data",),
        body=_TRAINING,
        purged_on_request={files.ORIGINAL: "the model that still knows what was to be forgotten"},
        done=lambda inputs: inputs.checkpoint_replaced(),
        version=2,
        shared=True,
    ),
    Stage(
        name="oracle",
        function="train:oracle",
        estimate="train:oracle_estimate",
        file=files.ORACLE,
        command="megu train --retain-only",
        settings=_TRAIN,
        inputs=_REQUEST,
        body=_TRAINING,
        purged_on_request={files.ORACLE: "the retrained model"},
        switch="eval.oracle",
        version=2,
        shared=True,
    ),
    # The ratings come before any training: they may fail for reasons outside, such as a server or a key.
    Stage(
        name="similarity",
        function="similarity:similarity",
        estimate="similarity:similarity_estimate",
        file=files.SIMILARITY,
        command="megu similarity",
        settings=("mllm.backend",),
        inputs=("concepts",),
        body={"classes": [str], "rater": str, "scores": {str: {str: _NUMBER}}, "backend": str},
        required=("scores",),
        traces={files.ANSWERS: "raw answers about images"},
        by_config=_rating,
        also_writes=_answers,
        group="ratings",
        done=lambda inputs: inputs.free_rater(),
        method="megu",
        applies=lambda config: config.takes_ratings,
    ),
    Stage(
        name="transition",
        function="similarity:transition",
        estimate="similarity:transition_estimate",
        file=files.TRANSITION,
        command="megu similarity",
        settings=("transition",),
        inputs=("concepts",),
        body=_TRANSITION,
        needs=("similarity",),
        group="ratings",
        method="megu",
        applies=lambda config: config.takes_ratings,
    ),
    Stage(
        name="transition",
        function="similarity:measured",
        estimate="similarity:measured_estimate",
        file=files.TRANSITION,
        command="megu similarity",
        settings=("model.name", "transition"),
        inputs=_REQUEST,
        body=_TRANSITION,
        needs=("checkpoint",),
        group="ratings",
        method="megu",
        applies=lambda config: not config.takes_ratings,
    ),
    Stage(
        name="labels",
        function="labels:labels",
        estimate="labels:labels_estimate",
        file=files.LABELS,
        command="megu labels",
        settings=("seed", "model.name", "labels"),
        inputs=_REQUEST,
        body={
            "mode": str,
            "classes": [str],
            "counts": {str: int},
            "keep": {str: _NUMBER},
            "proxy": {str: _NUMBER},
        },
        required=("mode",),
        traces={files.LABELS: "positions of the forgotten images and their perturbing labels"},
        needs=("transition", "checkpoint"),
        group="method",
        version=8,
        method="megu",
    ),
    Stage(
        name="noise",
        function="noise:noise",
        estimate="noise:noise_estimate",
        file=files.NOISE,
        command="megu noise",
        settings=("seed", "model.name", "finetune.batch", *_NOISE),
        inputs=_REQUEST,
        body={"use": str, "classes": [str]},
        traces={files.NOISE: "noises that were trained on images, or made to carry a forgotten class"},
        needs=("checkpoint", "labels"),
        group="method",
        version=2,
        shared=True,
        method="megu",
    ),
    Stage(
        name="finetune",
        function="finetune:finetune",
        estimate="finetune:finetune_estimate",
        file=files.FINETUNE,
        command="megu finetune",
        settings=("seed", "model.name", "finetune", "labels.source", "noise.strength"),
        inputs=_REQUEST,
        body={**_UNLEARNED, "calibrated": [str], "lr": _NUMBER},
        needs=("transition", "checkpoint", "labels", "noise", "wrapping", "outputs_without_images"),
        weights=(files.WEIGHTS,),
        also_writes=_unlearned,
        goal=True,
        group="method",
        version=15,
        shared=True,
        method="megu",
    ),
    Stage(
        name="finetune",
        function="finetune:hand_over",
        estimate="finetune:hand_over_estimate",
        file=files.FINETUNE,
        command="megu finetune",
        settings=("model.name", "method"),
        inputs=_REQUEST,
        body={**_UNLEARNED, "retrained_by": str},
        needs=("checkpoint", "retrained", "wrapping"),
        weights=(files.WEIGHTS,),
        also_writes=_unlearned,
        goal=True,
        group="method",
        method="retrain",
    ),
    Stage(
        name="eval",
        function="evaluate:evaluate",
        estimate="evaluate:evaluate_estimate",
        file=files.EVALUATION,
        command="megu eval",
        settings=("seed", "model.name", "eval.attack_samples", "eval.probe_samples", "eval.relearn_epochs"),
        inputs=(*_REQUEST, "test_data"),
        body={
            **dict.fromkeys((*_MODELS, "request", "time", "aggregates", "verdict"), dict),
            **{key: {str: dict} for key in ("comparison", "per_class", "entanglement", "intervals")},
            "warnings": [str],
        },
        needs=("checkpoint", "finetune"),
        optional=("labels", "oracle"),
        by_config=_judge,
        goal=True,
        group="evaluation",
        version=catalogue.VERSION,
        shared=True,
    ),
)
# Every stage by its first row. All rows of a stage have the same files, command and group.
STAGES: dict[str, Stage] = {}
for _row in _ROWS:
    STAGES.setdefault(_row.name, _row)
_MORE = [stage for stage in _ROWS if stage is not STAGES[stage.name]]


def of_config(config: Config) -> dict[str, Stage]:
    """The stages that a config may have, each by the row that is for it, in the order of the table."""
    methods = ("", "retrain" if config.retrains else "megu")
    rows = [stage for stage in (*STAGES.values(), *_MORE) if stage.method in methods and stage.applies(config)]
    fitting = {stage.name: stage for stage in rows}
    return {name: fitting[name] for name in STAGES if name in fitting}


def in_group(*groups: str) -> list[str]:
    """Names of the stages of some kinds of work, in the order of the table."""
    return [stage.name for stage in STAGES.values() if stage.group in groups]
