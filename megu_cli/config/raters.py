"""The table of raters: who gives the similarity ratings, and what the ratings of each depend on.

A new rater is a row here and a module in `megu_cli.mllm` with its class. Nothing is imported from there: a row names
the class, and `megu_cli.mllm.backends` loads it when the ratings are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

Names = tuple[str, ...]

# What the answers of a rater that is shown images depend on besides: settings, and inputs of stages.
_SHOWING: tuple[Names, Names] = (("mllm.images_per_class", "mllm.image_size"), ("train_data", "forget"))


@dataclass(frozen=True)
class RaterKind:
    """One value of ``mllm.backend``.

    Attributes:
        name: The value.
        backend: The class, as ``module:Class`` in `megu_cli.mllm`; its class method ``of`` takes a
            `megu_cli.mllm.backends.Setup`.
        text: What it is, in the description of the setting.
        rates: False: there are no ratings.
        asks: True: a model is asked, about images where ``mllm.images`` allows it, and its raw answers are kept.
        questions: Values of ``mllm.question`` that it can be asked.
        needs: Settings of ``mllm`` that must be given.
        settings: Dotted config keys that the ratings depend on. Waiting times, concurrency and keys are none of them.
        inputs: Inputs that the ratings depend on; names in `megu_cli.pipeline.inputs.INPUTS`.
    """

    name: str
    backend: str
    text: str
    rates: bool = True
    asks: bool = True
    questions: Names = ("rating",)
    needs: Names = ()
    settings: Names = ()
    inputs: Names = ()

    def depends_on(self, images: str) -> tuple[Names, Names]:
        """Return all settings and inputs that the ratings depend on.

        Args:
            images: The setting ``mllm.images``.
        """
        if not self.asks:
            return self.settings, self.inputs
        settings, inputs = _SHOWING if images != "none" else ((), ())
        return (*self.settings, "mllm.images", "mllm.question", *settings), (*self.inputs, *inputs)


_BOTH = ("rating", "true_false")
_ROWS = (
    RaterKind("none", "unrated:Unrated", "no ratings, every class is as near as any other", rates=False, asks=False),
    RaterKind("recorded", "recorded:Recorded", "replay the ratings in a file", asks=False, inputs=("ratings",)),
    RaterKind(
        "local",
        "local:Local",
        "a vision-language model of transformers",
        questions=_BOTH,
        needs=("model",),
        settings=("mllm.dtype",),
        inputs=("prompt", "rater_model"),
    ),
    RaterKind(
        "endpoint",
        "endpoint:Endpoint",
        "an OpenAI-compatible server",
        questions=_BOTH,
        needs=("model", "base_url"),
        settings=("mllm.model", "mllm.base_url"),
        inputs=("prompt",),
    ),
    RaterKind(
        "clip",
        "clip:Clip",
        "a CLIP or SigLIP model of transformers",
        needs=("model",),
        settings=("mllm.dtype",),
        inputs=("prompt", "rater_model"),
    ),
)
RATERS = {row.name: row for row in _ROWS}
_ASKING = [row.name for row in _ROWS if row.asks]
# The raters that ask a model, as a message names them.
ASKING = f"{', '.join(_ASKING[:-1])} or {_ASKING[-1]}"

# The raters that can be asked for True or False.
TRUE_FALSE = " or ".join(row.name for row in _ROWS if "true_false" in row.questions)

# The values of ``mllm.backend``.
_NAMES = ("auto", *RATERS)
if TYPE_CHECKING:
    RaterName = str
else:
    RaterName = Literal[_NAMES]
