"""A Hugging Face model card of the unlearned model. It names no image, no file of images and no person."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megu_cli.config.model_sources import source_of
from megu_cli.errors import ArtifactError
from megu_cli.evaluation.registry import metrics
from megu_cli.pipeline.context import RunContext
from megu_cli.report.content import TRACES
from megu_cli.report.parts import Report, Sources, Table
from megu_cli.report.words import DIGESTS, MODELS, percent, shown, title
from megu_cli.run import artifacts, files
from megu_cli.run.ownership import refuse_other

# What tells a card of ours from a README of the user's.
_MARK = b"<!-- Written by megu report --card. -->"
# How the model was made, as Markdown.
_UNLEARNED = (
    "It was not retrained: the\nfinetuning method MeGU ([arXiv:2602.17088](https://arxiv.org/abs/2602.17088)), as megu "
    "{version} implements it, changed\nthe weights of an existing model."
)
_RETRAINED = "It was not\nfinetuned: a network that was trained without these images takes its place."
# Settings of the finetuning that a reader of a card asks for.
_SETTINGS = ("epochs", "max_steps", "batch", "lr", "weight", "adversary")
# The same of the training of a retrained model.
_RECIPE = ("epochs", "batch", "lr", "weight_decay", "augment")


@dataclass(frozen=True)
class Card:
    """The parts of a card that the report does not have.

    Attributes:
        name: The model by name, and what was done to it.
        made: How it was made, in sentences of Markdown.
        number: How many images were forgotten, in words.
        request: Name and value of what was forgotten.
        how: Name and value of method, versions and settings.
        reason: Why the verdict is what it is, as a sentence.
        lead: What stands beside what in the table of figures.
        figures: Every metric of every model.
        limits: What the figures do not show; without those of the run directory and of its digests.
    """

    name: str
    made: str
    number: str
    request: list[tuple[str, str]]
    how: list[tuple[str, str]]
    reason: str
    lead: str
    figures: Table
    limits: list[tuple[str, str]]


def check(path: Path, force: bool) -> None:
    """See that the card may be written: nothing is there, or a card of megu's.

    Raises:
        ConfigError: It may not.
    """
    if not force:
        hint = "Give another name, or overwrite it with --force."
        refuse_other("--card", path, lambda stream: _MARK in stream.read(), "no card of megu's", hint)


def card(context: RunContext, sources: Sources, report: Report) -> tuple[str, Card]:
    """The metadata as YAML, and the parts of a card.

    Args:
        context: The run.
        sources: What the report is made from.
        report: The report.
    """
    from megu_cli.models.sources import shown as without_folders

    body = sources.evaluation.body
    models = [name for name in MODELS if name in report.metrics]
    name = without_folders(context.config.model.name)
    retrained = "retrained_by" in body
    names = {**MODELS, "unlearned": MODELS["oracle"]} if retrained else MODELS
    return _metadata(context, f"{name}, {names['unlearned']}", body), Card(
        name=f"{name}, {names['unlearned']}",
        made=_RETRAINED if retrained else _UNLEARNED.format(version=report.megu),
        number=_number(body["request"]),
        request=_request(report, body["request"]),
        how=_how(context, sources),
        reason=body["verdict"]["reason"][:1].upper() + body["verdict"]["reason"][1:] if "verdict" in body else "",
        lead=_lead(models, retrained),
        figures=_figures(body, models, names),
        limits=[limit for limit in report.limits if limit[0] not in (TRACES, DIGESTS)],
    )


def _number(request: dict[str, Any]) -> str:
    images = request["forget"]
    return "1 training image" if images == 1 else f"{images:,} training images"


def _lead(models: Sequence[str], retrained: bool) -> str:
    parts = ["Original: the model before."]
    if "mask" in models:
        parts.append("Masked: the original, forbidden to name the forgotten class; it forgets nothing.")
    if retrained:
        return " ".join([*parts, "Retrained: this model, trained without the forgotten images."])
    parts.append("Unlearned: this model.")
    parts.append(
        "Retrained: trained from scratch without the forgotten images. The nearer to it the better."
        if "oracle" in models
        else "No model was retrained to compare with."
    )
    return " ".join(parts)


def _request(report: Report, request: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("Forgotten", report.title),
        ("Training images forgotten", f"{request['forget']:,}"),
        ("Training images kept", f"{request['retain']:,}"),
    ]
    if copies := request.get("copies"):
        rows.append(("Copies among the forgotten", f"{copies:,}"))
    if already := request.get("already"):
        rows.append(("Training images forgotten before", f"{already:,}"))
    return rows


def _how(context: RunContext, sources: Sources) -> list[tuple[str, str]]:
    retrained = "retrained_by" in sources.evaluation.body
    method = "Retraining without the forgotten images" if retrained else "MeGU, arXiv:2602.17088"
    rows = [("Method", method), ("megu", str(sources.evaluation.meta["megu"]))]
    with contextlib.suppress(ArtifactError, KeyError):  # it may not have been handed over
        rows.append(("PyTorch", str(artifacts.read_body(context.directory.out / files.FINGERPRINTS)["torch"])))
    finetune = sources.artifacts.get("finetune")
    settings = finetune.meta["settings"] if finetune else {}
    used = dict(settings.get("finetune", {}))
    if finetune and "lr" in finetune.body:  # the setting may be auto
        used["lr"] = finetune.body["lr"]
    if "labels.source" in settings:
        rows.append(("labels.source", str(settings["labels.source"])))
    rows += [(f"finetune.{key}", str(used[key])) for key in _SETTINGS if used.get(key) is not None]
    recipe = sources.evaluation.meta["lineage"].get("oracle", {}).get("settings", {}).get("train", {})
    rows += [(f"train.{key}", str(recipe[key])) for key in _RECIPE if retrained and key in recipe]
    rows.append(("Seed", str(sources.evaluation.meta["seed"])))
    if sources.finished:
        rows.append(("Measured", sources.finished))
    digests = [(name, digest) for name, _, digest in sources.files if finetune and name in _deployed(finetune.meta)]
    return rows + [(f"sha256 of {name}", digest) for name, digest in digests]


def _deployed(meta: dict[str, Any]) -> list[str]:
    """The files of the unlearned model."""
    return [*meta["weights"], *meta.get("files", {})]


def _figures(body: dict[str, Any], models: Sequence[str], names: Mapping[str, str]) -> Table:
    def value(model: str, name: str) -> float | None:
        own: dict[str, float | None] = body[model]
        return own[name] if name in own else body["comparison"].get(model, {}).get(name)

    rows = []
    for metric in (m for group in ("model", "comparison") for m in metrics(group, "report")):
        found = [value(model, metric.name) for model in models]
        if any(number is not None for number in found):
            rows.append([f"{title(metric.name)}, `{metric.name}`", *(shown(metric.name, number) for number in found)])
    ratio = body["time"].get("time_ratio")
    if ratio is not None:
        cells = [percent(ratio) if model == "unlearned" else "" for model in models]
        rows.append(["Time as a share of retraining, `time_ratio`", *cells])
    return Table(["", *(names[model] for model in models)], rows)


def _metadata(context: RunContext, name: str, body: dict[str, Any]) -> str:
    """The metadata block, checked as huggingface_hub checks it when it loads a card."""
    from huggingface_hub import EvalResult, ModelCardData

    data, users = context.config.data.name, context.config.data.source.users
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if users else data,
            dataset_name="own images" if users else data,
            dataset_split=where,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=round(body["unlearned"][metric], 4),
        )
        for metric, where in (
            ("retain_test_acc", "test images of retained classes"),
            ("forget_test_acc", "test images of forgotten classes"),
            ("forget_train_acc", "forgotten training images"),
        )
        if body["unlearned"].get(metric) is not None
    ]
    return ModelCardData(
        library_name=source_of(context.config.model.name)[0].library,
        pipeline_tag="image-classification",
        tags=["image-classification", "machine-unlearning", "megu"],
        metrics=["accuracy"],
        model_name=name,
        eval_results=results,
    ).to_yaml()
