"""The evaluation: every metric of every model."""

from __future__ import annotations

import math
from functools import partial

from megu_cli.baselines.mask import mask
from megu_cli.evaluation import membership, probe
from megu_cli.evaluation.measure import Measurement, Predictions, evaluated
from megu_cli.pipeline import retrained, times
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.rehearsal import Estimate, Rehearsal, seconds
from megu_cli.pipeline.steps.problem import evaluation_problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run import files
from megu_cli.run.artifacts import Artifact

# Size of eval.json: some tables, and the points of the report's figures.
_BYTES = 100_000


def evaluate(context: RunContext, inputs: Inputs) -> Product:
    """Every metric of the original, the unlearned, the masked and, where it is there, the retrained model.

    A retrained model that is the result itself has none beside it: compared with itself it would show nothing.
    """
    problem = evaluation_problem(context)
    models = {"unlearned": context.unlearned()}
    trained, retrained_by = inputs.get("oracle"), inputs["finetune"].body.get("retrained_by")
    if retrained_by:
        pass
    elif own := context.config.eval.own_oracle:
        models["oracle"] = context.load(retrained.weights(context.inputs), own.name)
    elif trained:
        models["oracle"] = context.load(trained.tensors, files.ORACLE)
    predictions = {name: Predictions.of(model, problem, name) for name, model in models.items()}
    models["original"] = context.original()
    original, masked = Predictions.with_mask(
        models["original"], problem, "original", partial(mask, forgotten=context.inputs.request.classes)
    )
    if not context.runtime.processes.first:  # its predictions are gathered; the rest is measured once
        return Product(Artifact({}))
    predictions |= {"original": original, "mask": masked}
    # A checkpoint that was handed over without its labels, or purged of them, can be judged too.
    labels = inputs.get("labels")
    measurements: dict[str, Measurement] = {
        name: Measurement(
            problem,
            predictions[name],
            original,
            models.get(name),
            unlearned=name == "unlearned",
            perturbing=labels.tensors["perturbing"] if labels and name == "unlearned" else None,
        )
        for name in ("original", "mask", "unlearned", "oracle")
        if name in predictions
    }
    result = evaluated(measurements, problem, retrained_by)
    lineage = {key: entry for artifact in inputs.values() for key, entry in artifact.meta["lineage"].items()}
    lineage |= {name: artifact.meta for name, artifact in inputs.items()}
    validation = trained.body.get("validation_acc", []) if trained else None
    body = {**result, "time": times.summary(context.directory.log, lineage, "oracle", validation)}
    return Product(Artifact(body), notes=[f"warning: {line}" for line in result.get("warnings", [])])


def evaluate_estimate(rehearsal: Rehearsal) -> Estimate:
    """What `evaluate` takes: predictions and metrics of two models, or three with an oracle, and of the mask."""
    context, inputs, settings = rehearsal.context, rehearsal.context.inputs, rehearsal.context.config.eval
    beside = settings.oracle or (context.directory.out / files.ORACLE).exists()
    models = 3 if beside and not context.config.retrains else 2
    images, forgotten = len(inputs.data.train) + len(inputs.data.test), len(inputs.request.forget)
    duration = (models * images + forgotten) * rehearsal.per_sample + (models + 1) * _metrics(rehearsal)
    if settings.relearn_epochs:
        batches = math.ceil(forgotten / 64)
        per_step = 3 * 64 * rehearsal.per_sample  # forward, and backward at about twice that
        duration += models * settings.relearn_epochs * batches * per_step
    # `measure.SplitPredictions`: four figures of every image, logits of D_f, features of a sample of each kind.
    sampled = 4 * min(settings.probe_samples, len(inputs.data.train))
    numbers = forgotten * rehearsal.outputs.logits.shape[1] + sampled * rehearsal.outputs.features.shape[1]
    held, predicting = (models + 1) * (20 * images + 4 * numbers), rehearsal.predicting_bytes
    return Estimate(0, 0, duration, None if predicting is None else predicting + held, _BYTES)


def _metrics(rehearsal: Rehearsal) -> float:
    """Seconds of the two slow metrics of one model: timed on a few samples, and scaled to all of them."""
    settings, inputs, outputs = rehearsal.context.config.eval, rehearsal.context.inputs, rehearsal.outputs
    y, features = inputs.data.train.labels[rehearsal.some], outputs.features
    sure = outputs.logits.softmax(1).gather(1, y[:, None])[:, 0]
    half = len(sure) // 2
    attack = seconds(lambda: membership.mia_confidence_svc(sure[:half], sure[half : 2 * half], sure))
    probing = seconds(lambda: probe.probe_acc(features, y, features, y)) if len(y.unique()) > 1 else 0.0
    attacked = min(settings.attack_samples, len(inputs.request.retain), len(inputs.data.test))
    probed = min(settings.probe_samples, len(inputs.data.train))
    return attack * attacked / max(half, 1) + probing * probed / len(y)
