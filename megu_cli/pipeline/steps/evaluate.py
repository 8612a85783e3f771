"""The evaluation: every metric of every model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megu_cli.errors import ArtifactError
from megu_cli.evaluation.distance import label_agreement
from megu_cli.pipeline import measuring
from megu_cli.pipeline.steps.product import Inputs, Product
from megu_cli.pipeline.workspace import Workspace
from megu_cli.run.artifacts import Artifact, read


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
