"""The finetuning, or the retrained model in its place, and the files of the unlearned model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megu_cli.method import unlearn as unlearning
from megu_cli.method.labels import unseen_by_both
from megu_cli.models import huggingface
from megu_cli.models.marks import MARK, marked
from megu_cli.models.weights import State, like, unreached
from megu_cli.pipeline import retrained
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.rehearsal import STEPS, Estimate, Rehearsal, timed, watched
from megu_cli.pipeline.steps.labels import loaded, stand_in
from megu_cli.pipeline.steps.problem import fresh, pretrained, problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.request.earlier import provenance, record
from megu_cli.run.artifacts import Artifact, canonical
from megu_cli.run.files import ORACLE, UNLEARNED, WEIGHTS


def finetune(context: RunContext, inputs: Inputs) -> Product:
    """Fragment-Align: the unlearned model."""
    made = loaded(inputs["labels"])
    model = context.original()
    given = problem(context)
    aligned = unlearning.align(given, model, inputs["transition"].tensors["transition"], made, inputs["noise"].tensors)
    calibrated = unlearning.calibrate(given, model, made)
    if not context.runtime.processes.first:  # the model is the same in all processes: one makes the files of it
        return Product(Artifact({}))
    history = aligned.history
    body = {
        "loss": history.loss,
        "validation_acc": history.validation,
        "steps": history.steps,
        "lr": aligned.lr,
        "forgotten": record(context.inputs.data, context.inputs.request, context.inputs.earlier),
    }
    state, notes = _without_idle(context, model, body)
    notes += [
        f"at a learning rate of {rate:g} the "
        + ("loss was no longer finite" if accuracy is None else f"accuracy on held-out images was {accuracy:.1%}")
        + ": finetuned once more at a lower one"
        for rate, accuracy in aligned.lowered
    ]
    if calibrated is not None:
        classes = context.inputs.data.classes
        body["calibrated"] = [classes[c] for c in context.inputs.request.classes] if calibrated else []
    if calibrated is False:
        notes.append(
            "the outputs of the forgotten classes stay as the finetuning left them (finetune.calibrate): the logits "
            "are not those of a linear layer on the model's features"
        )
    return _unlearned(context, state, body, notes)


def hand_over(context: RunContext, inputs: Inputs) -> Product:
    """The retrained model in place of an unlearned one: the oracle, or the user's own (``eval.oracle: FILE``)."""
    trained, own = inputs.get("oracle"), context.config.eval.own_oracle
    body: dict[str, Any] = {"retrained_by": "user", "loss": [], "validation_acc": [], "steps": 0}
    if trained:
        weights, source, training = trained.tensors, ORACLE, trained.body
        steps = len(training["loss"]) * math.ceil(training["samples"] / context.config.train.batch)
        curves = {key: training[key] for key in ("loss", "validation_acc")}
        body = {"retrained_by": "factory" if pretrained(context) else "megu", **curves, "steps": steps}
    else:
        assert own is not None  # otherwise the oracle is an input
        weights, source = retrained.weights(context.inputs), own.name
    body["forgotten"] = record(context.inputs.data, context.inputs.request, context.inputs.earlier)
    notes = [f"nothing is finetuned: {source} is the result"]
    return _unlearned(context, context.load(weights, source).state_dict(), body, notes)


def _without_idle(context: RunContext, model: nn.Module, body: dict[str, Any]) -> tuple[State, list[str]]:
    """The weights of a finetuned model, those that its logits do not depend on initialised anew, and a note of it."""
    state = model.state_dict()
    if idle := unreached(model, _example(context)):
        # No step has touched them, and what they learned they would keep.
        newly = fresh(context, "idle").state_dict()
        trained = {name for name, _ in model.named_parameters()}
        parts = {name.rpartition(".")[0] for name in idle} - {""}
        # Their running statistics as well.
        idle = [n for n in state if n in idle or (n not in trained and n.rpartition(".")[0] in parts)]
        state = {name: newly[name] if name in idle else value for name, value in state.items()}
        body["reinitialised"] = idle
        return state, [f"initialised anew, since the logits do not depend on them: {_some(idle)}"]
    return state, []


def _example(context: RunContext) -> torch.Tensor:
    """A retained image as the model takes it."""
    return next(context.inputs.data.train.batches([context.inputs.request.retain[:1]], context.runtime.device))


def _unlearned(context: RunContext, state: State, body: dict[str, Any], notes: list[str]) -> Product:
    """The unlearned weights as the original ones came: file or directory, keys, dtypes, wrapping."""
    files, called = {}, "retrained" if "retrained_by" in body else "unlearned"
    weights = like(state, context.inputs.original.weights)
    if context.inputs.user_model.folder:
        own = context.inputs.user_model.checkpoint
        content, renamed = huggingface.directory(
            str(context.inputs.user_model.folder),
            own if own and own.is_dir() else None,
            {name: weights.get(name, value.cpu()) for name, value in state.items()},
            context.inputs.data.classes,
            replace(
                context.inputs.user_model.preprocessing,
                mean=tuple(context.inputs.data.train.mean.flatten().tolist()),
                std=tuple(context.inputs.data.train.std.flatten().tolist()),
                image_size=_example(context).shape[-1],
            ),
            context.config.model.trust_remote_code,
        )
        in_directory = _provenance(context, body, renamed)
        content = huggingface.marked(content, in_directory)
        files = {f"{UNLEARNED}/{name}": data for name, data in content.items()}
        notes.append(f"{UNLEARNED}/ is the {called} model for from_pretrained()")
        if own and own.is_dir():
            return _product(body, renamed, in_directory, files, notes)
    if context.inputs.user_model.checkpoint and context.inputs.wrapped:
        renewed = context.inputs.original.file.renewed(state)
        body["checkpoint"] = {
            "weights": context.inputs.original.file.chosen.name,
            "replaced": renewed.replaced,
            "dropped": renewed.dropped,
        }
        if context.inputs.original.file.suffix == ".safetensors":
            weights = renewed.content
        else:
            mark = canonical(_provenance(context, body, weights)).decode()
            files[f"{UNLEARNED}{context.inputs.original.file.suffix}"] = marked(
                context.inputs.original.file.written(state), mark
            )
            notes.append(
                f"{UNLEARNED}{context.inputs.original.file.suffix} is the {called} checkpoint, wrapped as the input is"
            )
        if len(renewed.replaced) > 1:
            notes.append(f"{called} from {renewed.replaced[0]}; replaced as well: {_some(renewed.replaced[1:])}")
        if renewed.dropped:
            notes.append(f"left out, since it was learned: {_some(renewed.dropped)}")
    return _product(body, weights, _provenance(context, body, weights), files, notes)


def _provenance(context: RunContext, body: Mapping[str, Any], weights: State) -> dict[str, Any]:
    request = [context.inputs.digest("train_data"), context.inputs.digest("forget")]
    return provenance(
        body["forgotten"], context.inputs.earlier.of_checkpoint, context.inputs.original.weights, weights, request
    )


def _product(
    body: dict[str, Any], weights: State, mark: dict[str, Any], files: dict[str, bytes], notes: list[str]
) -> Product:
    metadata = {MARK: canonical(mark).decode()}
    return Product(Artifact({**body, "provenance": mark}), {WEIGHTS: weights}, metadata, files, notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def finetune_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `finetune` takes."""
    given, inputs = rehearsal.problem, rehearsal.context.inputs
    settings = given.finetune
    whole = settings.epochs * math.ceil(given.retain_samples / settings.batch)
    steps = min(whole, settings.max_steps or whole)
    small = replace(
        given,
        finetune=settings.model_copy(update={"max_steps": 1 + STEPS, "lr": 1e-6}),
        request=replace(given.request, validation=given.request.validation[:0]),
    )
    candidates = {question.concept: question.candidates for question in inputs.questions}
    level = {concept: dict.fromkeys(compared, 0.0) for concept, compared in candidates.items()}
    matrix, labels, pair = unlearning.transition(given, candidates, level), stand_in(given), _pair(rehearsal)
    model = rehearsal.model()
    with rehearsal.peak() as memory:
        step = timed(lambda watch: unlearning.align(watched(small, watch), model, matrix, labels, pair))
    epochs = math.ceil(steps * settings.epochs / whole)
    looked_at = epochs * len(inputs.request.validation)
    if settings.calibrate and given.label_mode == "proxy" and given.request.kind == "classes":
        looked_at += len(inputs.request.forget) + len(unseen_by_both(given))
    seconds = steps * step + looked_at * rehearsal.per_sample
    return Estimate(steps, 0, seconds, memory(), rehearsal.model_bytes)


def hand_over_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `hand_over` takes: the training is that of the oracle."""
    return Estimate(disk_bytes=rehearsal.model_bytes)


def _pair(rehearsal: Rehearsal) -> dict[str, torch.Tensor]:
    """A noise pair of the right form."""
    given, inputs = rehearsal.problem, rehearsal.context.inputs
    first = next(inputs.data.train.batches([inputs.request.retain[:1]]))
    use = given.noise_use(given.label_mode)
    pair: dict[str, torch.Tensor] = {}
    for name, value in {"positive": stand_in(given).perturbing, "negative": given.true}.items():
        if use in ("both", name):
            pair[f"{name}_class"] = value.unique()
            pair[name] = torch.zeros(len(pair[f"{name}_class"]), given.noise.batch, *first.shape[1:])
    return pair
