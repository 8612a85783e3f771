"""The evaluation: every metric of every model."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from megu_cli.baselines.mask import mask
from megu_cli.errors import ArtifactError
from megu_cli.evaluation.measure import Measurement, Predictions, evaluated
from megu_cli.pipeline.steps.problem import evaluation_problem
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.pipeline.workspace import Workspace
from megu_cli.run.artifacts import Artifact, read


def evaluate(work: Workspace, inputs: Inputs) -> Product:
    """Every metric of the original, the unlearned, the masked and, where it is there, the retrained model."""
    problem = evaluation_problem(work)
    models = {"unlearned": work.unlearned()}
    if retrained := inputs.get("oracle"):
        models["oracle"] = work.load(retrained.tensors, "oracle.safetensors")
    predictions = {name: Predictions.of(model, problem, name) for name, model in models.items()}
    models["original"] = work.original()
    original, masked = Predictions.with_mask(
        models["original"], problem, "original", partial(mask, forgotten=work.request.classes)
    )
    if not work.crew.first:  # its predictions are gathered; the rest is measured once
        return Product(Artifact({}))
    predictions |= {"original": original, "mask": masked}
    labels = _perturbing(work, inputs["finetune"])
    measurements: dict[str, Measurement] = {
        name: Measurement(
            problem,
            predictions[name],
            original,
            models.get(name),
            unlearned=name == "unlearned",
            perturbing=labels if name == "unlearned" else None,
        )
        for name in ("original", "mask", "unlearned", "oracle")
        if name in predictions
    }
    return Product(Artifact(evaluated(measurements, problem)))


def _perturbing(work: Workspace, finetuned: Artifact) -> Tensor | None:
    """(N_f,) the perturbing labels that the model was finetuned with; ``None`` where they are gone.

    They are no input of the evaluation: a checkpoint handed over without them, or purged of them, can be judged too.
    """
    try:
        chosen = read(work.out / "labels.safetensors")
    except ArtifactError:
        return None
    return chosen.tensors["perturbing"] if chosen.content == finetuned.meta["inputs"]["labels"] else None
