"""One function per stage: config and loaded inputs in, an artifact out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megu_cli import training
from megu_cli.baselines.retrain import retrain
from megu_cli.baselines.task import BASELINE_EPOCHS, Task
from megu_cli.errors import ArtifactError
from megu_cli.evaluation.distance import label_agreement
from megu_cli.method import unlearn as unlearning
from megu_cli.method.unlearn import Labels, Problem
from megu_cli.mllm.base import Ratings
from megu_cli.models import huggingface
from megu_cli.models.checkpoints import MARK, UNLEARNED, marked
from megu_cli.models.sources import shown
from megu_cli.models.weights import State, like, unreached
from megu_cli.pipeline import measuring
from megu_cli.pipeline.workspace import Workspace
from megu_cli.request.earlier import provenance, record
from megu_cli.run.artifacts import Artifact, canonical, read

Inputs = Mapping[str, Artifact]


@dataclass(frozen=True)
class Product:
    """What a stage makes.

    Attributes:
        artifact: It names the other files by digest.
        weights: Plain weight files.
        metadata: Of the weight files.
        files: Other files, by their path in the run directory.
        notes: What the user is told of them.
    """

    artifact: Artifact
    weights: dict[str, State] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
        checkpoints=work.checkpoints,
        crew=work.crew,
        track=work.track,
    )
    return _trained(work, model, len(index), history)


def oracle(work: Workspace, inputs: Inputs) -> Product:
    """Retrain from a true re-initialisation, without the forget set: the same recipe, the same passes."""
    # What is loaded into the model does not matter: every weight is initialised anew.
    model = work.build()
    history = retrain(model, task(work), checkpoints=work.checkpoints, crew=work.crew, **work.config.train.model_dump())
    return _trained(work, model, len(work.request.retain), history)


def _trained(work: Workspace, model: nn.Module, samples: int, history: training.History) -> Product:
    body = {
        "model": shown(work.config.model.name),
        "classes": work.data.classes,
        "samples": samples,
        "loss": history.loss,
        "validation_acc": history.validation,
    }
    return Product(Artifact(body, {key: value.cpu() for key, value in model.state_dict().items()}))


def task(work: Workspace) -> Task:
    """The forget request as the baselines see it: an epoch is as long as one of the method's own finetuning."""
    given, request = problem(work), work.request
    return Task(
        split=work.data.train,
        retain=request.retain,
        forget=request.forget,
        validation=request.validation,
        forgotten=request.classes,
        classes=len(work.data.classes),
        fresh=lambda purpose: measuring.fresh(work, purpose),
        samples=given.retain_samples,
        batch=given.finetune.batch,
        forget_batch=given.forget_batch_in(BASELINE_EPOCHS),
        seed=work.config.seed,
        eval_batch=work.eval_batch,
        device=work.device,
        track=work.track,
    )


def problem(work: Workspace) -> Problem:
    """The forget request and the method's settings."""
    config = work.config
    return Problem(
        data=work.data,
        request=work.request,
        transition=config.transition,
        labels=config.labels,
        noise=config.noise,
        finetune=config.finetune,
        seed=config.seed,
        eval_batch=work.eval_batch,
        device=work.device,
        checkpoints=work.checkpoints,
        crew=work.crew,
        track=work.track,
    )


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
    candidates = {question.concept: question.candidates for question in work.questions}
    matrix = unlearning.transition(problem(work), candidates, inputs["similarity"].body["scores"])
    body = {"rows": [work.data.concepts[c] for c in work.request.asked], "columns": work.data.classes}
    return Product(Artifact(body, {"transition": matrix}))


def labels(work: Workspace, inputs: Inputs) -> Product:
    """A perturbing label, or a distribution over labels, for each forgotten sample."""
    given = problem(work)
    made = unlearning.perturb(given, work.original(), inputs["transition"].tensors["transition"])
    names = work.data.classes
    counts = torch.bincount(made.perturbing, minlength=len(names)).tolist()
    body: dict[str, Any] = {"mode": made.mode, "classes": names}
    if made.keep:
        body["keep"] = made.keep
    body["counts"] = {name: n for name, n in zip(names, counts, strict=True) if n}
    tensors = {"index": work.request.forget, "perturbing": made.perturbing}
    if made.target is not None:
        tensors["target"] = made.target
    notes = []
    if made.proxy:
        body["proxy"] = made.proxy
        if made.mode != "proxy":
            notes.append(
                f"the proxy is right on {made.proxy['held_out_acc']:.0%} of the held-out images, the model on "
                f"{made.proxy['original_held_out_acc']:.0%}: labels come from the ratings and the prediction instead"
            )
    if made.keep and work.config.labels.keep == "auto" and work.own.foreign and not work.data.borrowed:
        notes.append(
            f"the forgotten images keep {_kept(made.keep)} of their labels, as much as the model gives those of the "
            "images that data.validation holds out; if it was trained on these as well, take them from the test split "
            "with data.validation_from"
        )
    return Product(Artifact(body, tensors), notes=notes)


def _kept(keep: Mapping[str, float]) -> str:
    """Shares in words."""
    low, high = min(keep.values()), max(keep.values())
    return f"{high:.0%}" if low == high else f"{low:.0%} to {high:.0%}"


def noise(work: Workspace, inputs: Inputs) -> Product:
    """The positive-negative feature noise pair."""
    given = problem(work)
    made = _labels(inputs["labels"])
    pair = unlearning.noise_pair(given, work.original(), made)
    return Product(Artifact({"use": given.noise_use(made.mode), "classes": work.data.classes}, pair))


def _labels(artifact: Artifact) -> Labels:
    return Labels(artifact.body["mode"], artifact.tensors["perturbing"], artifact.tensors.get("target"))


def finetune(work: Workspace, inputs: Inputs) -> Product:
    """Fragment-Align: the unlearned model."""
    made = _labels(inputs["labels"])
    model = work.original()
    history = unlearning.align(
        problem(work), model, inputs["transition"].tensors["transition"], made, inputs["noise"].tensors
    )
    if not work.crew.first:  # the model is the same in all processes: one makes the files of it
        return Product(Artifact({}))
    body = {
        "loss": history.loss,
        "validation_acc": history.validation,
        "steps": history.steps,
        "forgotten": record(work.data, work.request, work.already),
    }
    return _unlearned(work, model, body)


def _unlearned(work: Workspace, model: nn.Module, body: dict[str, Any]) -> Product:
    """The unlearned weights as the original ones came: file or directory, keys, dtypes, wrapping."""
    original, files, notes = work.checkpoint, {}, []
    state = model.state_dict()
    example = next(work.data.train.batches([work.request.retain[:1]], work.device))
    if idle := unreached(model, example):
        # No step has touched them, and what they learned they would keep.
        newly = measuring.fresh(work, "idle").state_dict()
        trained = {name for name, _ in model.named_parameters()}
        parts = {name.rpartition(".")[0] for name in idle} - {""}
        # Their running statistics as well.
        idle = [n for n in state if n in idle or (n not in trained and n.rpartition(".")[0] in parts)]
        state = {name: newly[name] if name in idle else value for name, value in state.items()}
        body["reinitialised"] = idle
        notes.append(f"initialised anew, since the logits do not depend on them: {_some(idle)}")
    weights = like(state, original)
    if work.hf_folder:
        own = work.own_checkpoint
        content, renamed = huggingface.directory(
            str(work.hf_folder),
            own if own and own.is_dir() else None,
            {name: weights.get(name, value.cpu()) for name, value in state.items()},
            work.data.classes,
            replace(
                work.own.preprocessing,
                mean=tuple(work.data.train.mean.flatten().tolist()),
                std=tuple(work.data.train.std.flatten().tolist()),
                image_size=example.shape[-1],
            ),
            work.config.model.trust_remote_code,
        )
        in_directory = _provenance(work, body, renamed)
        content = huggingface.marked(content, in_directory)
        files = {f"{UNLEARNED}/{name}": data for name, data in content.items()}
        notes.append(f"{UNLEARNED}/ is the unlearned model for from_pretrained()")
        if own and own.is_dir():
            return _product(body, renamed, in_directory, files, notes)
    if work.own_checkpoint and work.wrapped:
        renewed = work.file.renewed(state)
        body["checkpoint"] = {
            "weights": work.file.chosen.name,
            "replaced": renewed.replaced,
            "dropped": renewed.dropped,
        }
        if work.file.suffix == ".safetensors":
            weights = renewed.content
        else:
            mark = canonical(_provenance(work, body, weights)).decode()
            files[f"model{work.file.suffix}"] = marked(work.file.written(state), mark)
            notes.append(f"model{work.file.suffix} is the unlearned checkpoint, wrapped as the input is")
        if len(renewed.replaced) > 1:
            notes.append(f"unlearned from {renewed.replaced[0]}; replaced as well: {_some(renewed.replaced[1:])}")
        if renewed.dropped:
            notes.append(f"left out, since it was learned: {_some(renewed.dropped)}")
    return _product(body, weights, _provenance(work, body, weights), files, notes)


def _provenance(work: Workspace, body: Mapping[str, Any], weights: State) -> dict[str, Any]:
    request = [work.digest("train_data"), work.digest("forget")]
    return provenance(body["forgotten"], work.already.own, work.checkpoint, weights, request)


def _product(
    body: dict[str, Any], weights: State, mark: dict[str, Any], files: dict[str, bytes], notes: list[str]
) -> Product:
    metadata = {MARK: canonical(mark).decode()}
    return Product(Artifact({**body, "provenance": mark}), {"model.safetensors": weights}, metadata, files, notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def evaluate(work: Workspace, inputs: Inputs) -> Product:
    """Every metric of the original, the unlearned, the masked and, where it is there, the retrained model."""
    request = work.request
    models = {"original": work.original(), "unlearned": work.unlearned()}
    if retrained := inputs.get("oracle"):
        models["oracle"] = work.load(retrained.tensors, "oracle.safetensors")
    seen = {name: measuring.Seen.by(model, work, name) for name, model in models.items() if name != "original"}
    seen["original"], masked = measuring.Seen.with_mask(models["original"], work, "original", request.classes)
    if not work.crew.first:  # its predictions are gathered; the rest is measured once
        return Product(Artifact({}))
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
