"""The user's own retrained model, which takes the place of the oracle that megu would train (``eval.oracle: FILE``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megu_cli.errors import CheckpointError
from megu_cli.run import artifacts

if TYPE_CHECKING:
    from megu_cli.models.weights import State
    from megu_cli.pipeline.run_inputs import RunInputs


def digest(inputs: RunInputs) -> str:
    """Content digest of the weights.

    Raises:
        CheckpointError: They cannot be read, do not fit, or are the original's.
    """
    from megu_cli.models.weights import load_state

    path = inputs.config.eval.own_oracle
    assert path is not None
    state = weights(inputs)
    load_state(inputs.original.network(), state, f"eval.oracle {path.name}")
    found = artifacts.state_digest(state)
    if inputs.original.path.exists() and found == artifacts.state_digest(inputs.original.weights):
        raise CheckpointError(
            "eval.oracle holds the weights of the original model",
            "Name the model that was retrained without the forgotten images, or set eval.oracle: true to train one.",
        )
    return found


def weights(inputs: RunInputs) -> State:
    """The weights of the retrained model, by the model's own names.

    Raises:
        CheckpointError: They cannot be read.
    """
    from megu_cli.models import checkpoints

    path, key = inputs.config.eval.own_oracle, inputs.config.model.key
    if path is None or not path.exists():
        raise CheckpointError(
            f"eval.oracle: no checkpoint at {path}",
            "Name the file of your own retrained model, or set eval.oracle: true to train one.",
        )
    if path.is_dir():
        return inputs.original.read_directory(path, "eval.oracle")
    try:
        return checkpoints.read(path, inputs.original.network(), key).state
    except CheckpointError as error:
        if key and error.message.startswith("model.key:"):  # the two files may be wrapped in other ways
            return checkpoints.read(path, inputs.original.network()).state
        raise
