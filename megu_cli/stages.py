"""One function per stage: config and loaded inputs in, an artifact out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import measuring, training
from megu_cli.artifacts import Artifact, read
from megu_cli.baselines.retrain import retrain
from megu_cli.baselines.task import Task
from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.evaluation.distance import label_agreement
from megu_cli.forget import record
from megu_cli.method import finetune as fragment_align
from megu_cli.method import labels as perturbing
from megu_cli.method.noise import train_noise
from megu_cli.method.transition import transition_matrix
from megu_cli.mllm.base import Ratings
from megu_cli.models import State, like, read_checkpoint
from megu_cli.runtime import generator
from megu_cli.workspace import Workspace

Inputs = Mapping[str, Artifact]


@dataclass(frozen=True)
class Product:
    """What a stage makes: its artifact, and plain weight files that the artifact names by digest."""

    artifact: Artifact
    weights: dict[str, State] = field(default_factory=dict)


def train(work: Workspace, inputs: Inputs) -> Product:
    """Train the original model on all training images but the held-out ones."""
    settings = work.config.train
    model = measuring.fresh(work, "train")
    index = torch.where(~work.data.validation)[0]
    history = training.train_classifier(
        model,
        work.data.train,
        index,
        epochs=settings.epochs,
        batch=settings.batch,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        augment=settings.augment,
        seed=work.config.seed,
        label="train",
        device=work.device,
        track=work.track,
    )
    return _trained(work, model, len(index), history)


def oracle(work: Workspace, inputs: Inputs) -> Product:
    """Retrain from a true re-initialisation, without the forget set: the same recipe, the same passes."""
    # What is loaded into the model does not matter: every weight is initialised anew.
    model = work.build()
    history = retrain(model, task(work), **work.config.train.model_dump())
    return _trained(work, model, len(work.request.retain), history)


def _trained(work: Workspace, model: nn.Module, samples: int, history: training.History) -> Product:
    body = {
        "model": work.config.model.name,
        "classes": work.data.classes,
        "samples": samples,
        "loss": history.loss,
        "validation_acc": history.validation,
    }
    return Product(Artifact(body, {key: value.cpu() for key, value in model.state_dict().items()}))


def task(work: Workspace) -> Task:
    """The forget request as the baselines see it, with the sizes of the method's own finetuning."""
    settings, request = work.config.finetune, work.request
    return Task(
        split=work.data.train,
        retain=request.retain,
        forget=request.forget,
        validation=request.validation,
        forgotten=request.classes,
        classes=len(work.data.classes),
        fresh=lambda purpose: measuring.fresh(work, purpose),
        samples=retain_samples(work),
        batch=settings.batch,
        forget_batch=settings.forget_batch,
        seed=work.config.seed,
        device=work.device,
        track=work.track,
    )


def retain_samples(work: Workspace) -> int:
    """Retained samples per epoch of a finetuning."""
    settings = work.config.finetune
    if settings.retain_fraction == "auto":
        return 12_000
    return max(settings.batch, round(settings.retain_fraction * len(work.request.retain)))


def similarity(work: Workspace, inputs: Inputs) -> Product:
    """Ratings of how similar the forgotten concepts are to the retained ones."""
    # With a single candidate there is nothing to ask: the transition is certain.
    asked = [question for question in work.questions if len(question.candidates) > 1]
    ratings = work.rater.rate(asked) if asked else Ratings("nobody: a single candidate needs no rating", {}, {})
    body = {
        "classes": work.data.concepts,
        "rater": ratings.rater,
        "scores": ratings.scores,
        "backend": work.config.mllm.backend,
        **ratings.provenance,
    }
    return Product(Artifact(body))


def transition(work: Workspace, inputs: Inputs) -> Product:
    """The transition matrix of the rated concepts."""
    scores = inputs["similarity"].body["scores"]
    data, request = work.data, work.request
    ratings = torch.full((len(request.asked), len(data.concepts)), float("nan"), dtype=torch.float64)
    column = {name: i for i, name in enumerate(data.concepts)}
    for row, question in enumerate(work.questions):
        for candidate in question.candidates:
            only = len(question.candidates) == 1
            rating = 0.0 if only else scores[question.concept].get(candidate)
            if rating is not None:
                ratings[row, column[candidate]] = rating
    matrix = transition_matrix(
        ratings,
        request.asked,
        data.concept_class,
        classes=len(data.classes),
        forgotten=request.concepts,
        own_class=request.kind == "subclasses",
        temperature=work.config.transition.temperature,
    )
    body = {"rows": [data.concepts[c] for c in request.asked], "columns": data.classes}
    return Product(Artifact(body, {"transition": matrix}))


def labels(work: Workspace, inputs: Inputs) -> Product:
    """A perturbing label, or a distribution over labels, for each forgotten sample."""
    settings, data, request = work.config.labels, work.data, work.request
    true, concepts = data.train.labels[request.forget], data.train.concepts[request.forget]
    logits = _says(work, request.forget)
    scores = perturbing.label_scores(_rows(work, inputs), logits.log_softmax(1), settings.source, settings.alpha)
    draw = generator(work.config.seed, "labels")
    mode = settings.mode if settings.mode != "auto" else ("hard" if request.kind == "classes" else "ranked")
    tensors = {"index": request.forget, "perturbing": perturbing.hard_labels(scores, settings.source, draw)}
    body: dict[str, Any] = {"mode": mode, "classes": data.classes}
    if mode != "hard":
        keep = _keep(work, mode)
        body["keep"] = {data.concepts[c]: float(keep[concepts == c][0]) for c in request.asked}
        if mode == "ranked":
            tensors["perturbing"] = perturbing.ranked_labels(scores, true, logits, concepts, keep)
        else:
            target = perturbing.soft_labels(scores, true, keep)
            if mode == "sample":
                tensors["perturbing"] = perturbing.draw_labels(target, draw)
            else:
                tensors["target"] = target.float()
    counts = torch.bincount(tensors["perturbing"], minlength=len(data.classes)).tolist()
    body["counts"] = {name: n for name, n in zip(data.classes, counts, strict=True) if n}
    return Product(Artifact(body, tensors))


def _keep(work: Workspace, mode: str) -> Tensor:
    """(N_f,) how much of its true label each forgotten sample keeps; nothing where the class is wholly forgotten.

    Raises:
        ConfigError: There are no held-out images to tell by.
    """
    data, request, given = work.data, work.request, work.config.labels.keep
    true, concepts = data.train.labels[request.forget], data.train.concepts[request.forget]
    if given == "auto":
        held_out = torch.where(data.validation)[0]
        if not len(held_out):
            raise ConfigError(
                "labels.keep: auto looks at held-out images, and data.validation leaves none",
                "Raise data.validation, or give labels.keep a number from 0 to 1.",
            )
        logits, labels_there = _says(work, held_out), data.train.labels[held_out]
        right = logits.argmax(1) == labels_there
        sure = logits.double().softmax(1).gather(1, labels_there[:, None])[:, 0]
        keep = perturbing.by_concept(right if mode == "ranked" else sure, data.train.concepts[held_out], concepts)
    else:
        keep = torch.full(true.shape, given, dtype=torch.float64)
    return keep.masked_fill(torch.isin(true, torch.tensor(request.classes, dtype=torch.int64)), 0)


def _says(work: Workspace, index: Tensor) -> Tensor:
    """Logits of the original model on training images."""
    outputs = training.predict(
        work.original(),
        work.data.train,
        index,
        classes=len(work.data.classes),
        device=work.device,
        label="labels",
        track=work.track,
    )
    return outputs.logits


def _rows(work: Workspace, inputs: Inputs) -> Tensor:
    """(N_f, K): each forgotten sample's row of the transition matrix."""
    row = torch.full((len(work.data.concepts),), -1)
    row[torch.tensor(work.request.asked)] = torch.arange(len(work.request.asked))
    return inputs["transition"].tensors["transition"][row[work.data.train.concepts[work.request.forget]]]


def noise(work: Workspace, inputs: Inputs) -> Product:
    """The positive-negative feature noise pair."""
    settings, data, request = work.config.noise, work.data, work.request
    use = settings.use if settings.use != "auto" else ("negative" if request.kind == "classes" else "none")
    tensors: dict[str, Tensor] = {}
    if use == "none":
        return Product(Artifact({"use": use, "classes": data.classes}))
    model = work.original()

    def pair(label: str, index: Tensor, group: Tensor, target: Tensor, away: bool) -> None:
        tensors[label] = train_noise(
            model,
            data.train,
            index,
            group,
            target,
            away=away,
            noises=settings.batch,
            steps=settings.steps,
            batch=work.config.finetune.batch,
            lr=settings.lr,
            penalty=settings.penalty,
            seed=work.config.seed,
            label=label,
            device=work.device,
            track=work.track,
        )
        tensors[f"{label}_class"] = target

    if use in ("both", "positive"):
        target, group = inputs["labels"].tensors["perturbing"].unique(return_inverse=True)
        pair("positive", request.forget, group, target, away=False)
    if use in ("both", "negative"):
        target, group = data.train.labels[request.forget].unique(return_inverse=True)
        away = settings.negative == "away"
        # Carrying noise is put on retained images, away noise on the forgotten ones of its class.
        index = request.forget if away else request.retain
        pair("negative", index, group if away else torch.arange(len(index)) % len(target), target, away)
    return Product(Artifact({"use": use, "classes": data.classes}, tensors))


def finetune(work: Workspace, inputs: Inputs) -> Product:
    """Fragment-Align: the unlearned model."""
    settings, data, request = work.config.finetune, work.data, work.request
    chosen, noises = inputs["labels"], inputs["noise"].tensors
    hard = chosen.tensors["perturbing"]
    target = chosen.tensors.get("target", functional.one_hot(hard, len(data.classes)).float())
    true = data.train.labels[request.forget]
    forgotten = fragment_align.Forgotten(
        index=request.forget,
        target=target,
        prior=_rows(work, inputs).log(),
        positive=_groups(hard, noises.get("positive_class")),
        negative=_groups(true, noises.get("negative_class")),
    )

    def validate(net: nn.Module) -> float:
        return training.accuracy(net, data.train, request.validation, work.device)

    model = work.original()
    history = fragment_align.finetune(
        model,
        data.train,
        request.retain,
        forgotten,
        positive=noises.get("positive"),
        negative=noises.get("negative"),
        uniform=work.config.noise.strength == "uniform",
        clean=settings.clean,
        reassign=settings.reassign and chosen.body["mode"] == "hard",
        beta=settings.beta,
        weight=settings.weight,
        epochs=settings.epochs,
        retain_samples=retain_samples(work),
        batch=settings.batch,
        forget_batch=settings.forget_batch,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        seed=work.config.seed,
        validate=validate if len(request.validation) else None,
        patience=settings.patience,
        device=work.device,
        track=work.track,
    )
    body = {
        "loss": history.loss,
        "validation_acc": history.validation,
        "steps": history.steps,
        "forgotten": record(data, request),
    }
    return Product(Artifact(body), {"model.safetensors": like(model.state_dict(), work.checkpoint)})


def _groups(value: Tensor, classes: Tensor | None) -> Tensor:
    """Position of each value in the sorted ``classes``."""
    return torch.zeros_like(value) if classes is None else torch.searchsorted(classes, value)


def evaluate(work: Workspace, inputs: Inputs) -> Product:
    """Every metric of the original, the unlearned, the masked and, where it is there, the retrained model."""
    request = work.request
    unlearned = work.load(read_checkpoint(work.out / "model.safetensors"), "model.safetensors")
    models = {"original": work.original(), "unlearned": unlearned}
    if retrained := inputs.get("oracle"):
        models["oracle"] = work.load(retrained.tensors, "oracle.safetensors")
    seen = {name: measuring.Seen.by(model, work, name) for name, model in models.items() if name != "original"}
    seen["original"], masked = measuring.Seen.with_mask(models["original"], work, "original", request.classes)
    assert masked is not None  # classes were given
    seen["mask"] = masked
    order = [name for name in ("original", "mask", "unlearned", "oracle") if name in seen]

    random = measuring.ignorant(work)
    result: dict[str, Any] = {name: measuring.metrics(seen[name], work, random) for name in order}
    for name, epochs in measuring.relearned(models, result["original"]["forget_train_acc"], work).items():
        result[name]["relearn_epochs"] = epochs
    result["per_class"] = measuring.per_class(seen, order, work)
    result["entanglement"] = {name: measuring.entangled(seen[name], seen["original"], work) for name in order}
    result["comparison"] = {}
    if "oracle" in seen:
        for name in order[:-1]:
            result["comparison"][name] = measuring.compared(
                seen[name], result[name], seen["oracle"], result["oracle"], work
            )
    chosen = _perturbing(work, inputs["finetune"])
    if "oracle" in seen:
        says = seen["oracle"].train.logits
        result["comparison"]["unlearned"]["label_agreement"] = None if chosen is None else label_agreement(chosen, says)
    result["request"] = measuring.described(work)
    result["aggregates"] = measuring.aggregated(seen, chosen, work)
    return Product(Artifact(result))


def _perturbing(work: Workspace, finetuned: Artifact) -> Tensor | None:
    """(N_f,) the perturbing labels that the model was finetuned with; ``None`` where they are gone.

    They are no input of the evaluation: a checkpoint handed over without them, or purged of them, can be judged too.
    """
    try:
        chosen = read(work.out / "labels.safetensors")
    except ArtifactError:
        return None
    return chosen.tensors["perturbing"] if chosen.content == finetuned.meta["inputs"]["labels"] else None
