"""The evaluation: every metric of every model."""

from __future__ import annotations

from functools import partial

from megu_cli.baselines.mask import mask
from megu_cli.evaluation.measure import Measurement, Predictions, evaluated
from megu_cli.pipeline import retrained, times
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import evaluation_problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.run import files
from megu_cli.run.artifacts import Artifact


def evaluate(work: RunContext, inputs: Inputs) -> Product:
    """Every metric of the original, the unlearned, the masked and, where it is there, the retrained model."""
    problem = evaluation_problem(work)
    models = {"unlearned": work.unlearned()}
    trained = inputs.get("oracle")
    if own := work.config.eval.own_oracle:
        models["oracle"] = work.load(retrained.weights(work.inputs), own.name)
    elif trained:
        models["oracle"] = work.load(trained.tensors, files.ORACLE)
    predictions = {name: Predictions.of(model, problem, name) for name, model in models.items()}
    models["original"] = work.original()
    original, masked = Predictions.with_mask(
        models["original"], problem, "original", partial(mask, forgotten=work.inputs.request.classes)
    )
    if not work.runtime.processes.first:  # its predictions are gathered; the rest is measured once
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
    result = evaluated(measurements, problem)
    lineage = {key: entry for artifact in inputs.values() for key, entry in artifact.meta["lineage"].items()}
    lineage |= {name: artifact.meta for name, artifact in inputs.items()}
    validation = trained.body.get("validation_acc", []) if trained else None
    body = {**result, "time": times.summary(work.directory.log, lineage, "oracle", validation)}
    return Product(Artifact(body), notes=[f"warning: {line}" for line in result.get("warnings", [])])
