"""What a forget request asks the MLLM, and which images may be shown for it."""

from __future__ import annotations

import torch

from megu_cli.config import MLLMConfig
from megu_cli.data import Dataset, sampled
from megu_cli.errors import DataError
from megu_cli.mllm.base import Question
from megu_cli.request.resolve import Request


def questions(data: Dataset, request: Request, settings: MLLMConfig) -> list[Question]:
    """The rows of ratings that the request needs, with the images that may be shown for them.

    Raises:
        DataError: ``mllm.images`` leaves no image of a concept.
    """
    names, gone = data.concepts, set(request.concepts)
    return [
        Question(
            names[c],
            [n for k, n in enumerate(names) if k != c and k not in gone],
            _shown(c, data, request, settings),
        )
        for c in request.asked
    ]


def _shown(concept: int, data: Dataset, request: Request, settings: MLLMConfig) -> list[int]:
    """Positions of the images of a concept that a model is shown."""
    if not settings.rater.asks or settings.images == "none":
        return []
    shown = data.train.concepts == concept
    whole = concept in request.concepts and not request.single
    if settings.images == "retain-only" or not whole:
        shown[request.forget] = False
    positions = torch.where(shown)[0].tolist()
    if not positions:
        raise DataError(
            f"mllm.images: {settings.images} leaves no image of {data.concepts[concept]} to show",
            "All of its training images are to be forgotten. Set mllm.images to none, to rate by name alone"
            + (", or to auto." if whole else "."),
        )
    return sampled(data.train, positions, settings.images_per_class)
