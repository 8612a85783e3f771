"""What the figures are called, and what they mean in plain words."""

from __future__ import annotations

from typing import Any

from megu_cli.evaluation.registry import Metric, find

MODELS = {
    "original": "original",
    "mask": "masked",
    "unlearned": "unlearned",
    "oracle": "retrained",
}


def metric(name: str) -> Metric:
    """A metric of the registry; one that is not there goes by its own name."""
    return find(name) or Metric(name, name, unit="number", plain="See docs/metrics.md.")


def title(name: str) -> str:
    """A metric's name for the reader of a report."""
    return metric(name).title or metric(name).label


def shown(name: str, value: Any) -> str:
    """A metric's value as text."""
    return metric(name).text(value, digits=1, sign="%")


def percent(value: float | None) -> str:
    """A fraction in percent, with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}%"


def listed(names: list[str], most: int = 5) -> str:
    """Names in a sentence."""
    names = names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


# The limit that is about the digests of a request.
DIGESTS = "Digests identify, they do not hide"

LIMITS = [
    (
        "Empirical evidence, no formal guarantee",
        "Every figure here was measured on this data and with these attacks. None of them proves that the data are "
        "gone: a stronger attack may find what these did not.",
    ),
    (
        "One model",
        "Only model.safetensors has forgotten. The original checkpoint, its backups, the images themselves, logs, and "
        "whatever was made from them elsewhere are as they were.",
    ),
    (
        "One run",
        "The figures are those of one seed. Another seed gives slightly different ones; differences to the retrained "
        "model that are smaller than those between two retrained models mean nothing.",
    ),
    (
        "Knowledge that others share",
        "What the retained images teach about the forgotten ones stays, as it would after retraining: the measure is "
        "the retrained model, not zero.",
    ),
    (
        DIGESTS,
        "The digest of a very short list of images can be found by trying lists out. Treat it as you treat the list.",
    ),
]

# Limits of a model that was retrained from scratch.
RETRAINED_LIMITS = [
    (
        "Exact for the images that were found",
        "The model was trained without the forgotten images and without the copies of them that were found. It may "
        "have been trained on other images of the same thing or person, if the request does not name them.",
    ),
    LIMITS[1],
    (
        "One run",
        "The figures are those of one seed. Another seed gives slightly different ones.",
    ),
    (
        "Knowledge that others share",
        "What the retained images teach about the forgotten ones is in the model.",
    ),
    LIMITS[-1],
]

DIGESTED = {
    "train_data": "the training images and labels",
    "test_data": "the test images and labels",
    "forget": "the forget request, as a list of images",
    "concepts": "the classes that were rated",
    "ratings": "the recorded similarity ratings",
    "prompt": "the questions to the rater, by version",
    "rater_model": "the model that rates",
    "checkpoint": "the original model, as it was given",
    "wrapping": "what the model's file has beside the weights",
    "outputs_without_images": "the outputs without images",
    "retrained": "the retrained model, as it was given",
    "train": "the original model",
    "oracle": "the retrained model",
    "similarity": "similarity ratings",
    "transition": "transition matrix",
    "labels": "perturbing labels",
    "noise": "noise pair",
    "finetune": "record of the finetuning",
    "eval": "evaluation",
}
