"""Stage 1 without a rater: the transition matrix from the original model's confusions or features.

Not in the paper, which takes a multimodal LLM's answers. Both look at held-out images first, on which the original was
not trained; where a concept has too few of them, at retained ones, and at forgotten ones last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megu_cli import training
from megu_cli.config import TransitionConfig
from megu_cli.data import Dataset, sampled
from megu_cli.errors import CheckpointError
from megu_cli.method.problem import UnlearningProblem
from megu_cli.method.transition import matrix_of
from megu_cli.mllm.base import SCALE
from megu_cli.models.features import has_head
from megu_cli.request.resolve import Request
from megu_cli.training import Outputs


def transition(problem: UnlearningProblem, model: nn.Module) -> Tensor:
    """The transition matrix by ``transition.from: confusions`` or ``embeddings``.

    Args:
        problem: The request and ``transition``.
        model: The original model, in eval mode.

    Returns:
        (len(asked), K) float64, each row summing to 1.

    Raises:
        CheckpointError: Features are asked for, and the model has no final layer to take them from.
    """
    settings = problem.transition
    places = images(problem.data, problem.request, settings)
    return (_confusions if settings.source == "confusions" else _embeddings)(problem, model, places)


def images(data: Dataset, request: Request, settings: TransitionConfig) -> dict[int, Tensor]:
    """Concept -> positions of its images that are looked at, in the training split followed by the held-out one.

    Confusions need the asked concepts alone, embeddings all that have images.
    """
    held_out = request.held_out(data)
    held_out = held_out[~data.held_out_among(request.already)[held_out]]
    sources = [
        (data.held_out, held_out, len(data.train)),
        (data.train, request.retain, 0),
        (data.train, request.forget[torch.isin(request.forget, data.withheld, invert=True)], 0),
    ]
    gone = {*request.concepts} - {*request.asked}
    others = [c for c in range(len(data.concepts)) if c not in gone and c not in request.asked]
    found: dict[int, Tensor] = {}
    for concept in [*request.asked, *(others if settings.source == "embeddings" else [])]:
        places: list[int] = []
        for split, index, offset in sources:
            own = index[split.concepts[index] == concept].tolist()
            places += [offset + place for place in sampled(split, own, settings.images - len(places))]
        if places:
            found[concept] = torch.tensor(places, dtype=torch.int64)
    return found


def _outputs(problem: UnlearningProblem, model: nn.Module, places: dict[int, Tensor], features: bool) -> list[Outputs]:
    """What the model says of the images of each concept."""
    data = problem.data
    said = training.predict(
        model,
        data.train.followed_by(data.held_out),
        torch.cat([*places.values()]),
        classes=len(data.classes),
        features=features,
        label="transition",
        execution=problem.execution.unshared,
    )
    ends = torch.tensor([len(positions) for positions in places.values()]).cumsum(0)
    starts = [0, *ends[:-1].tolist()]
    return [said.at(torch.arange(start, end)) for start, end in zip(starts, ends.tolist(), strict=True)]


def _confusions(problem: UnlearningProblem, model: nn.Module, places: dict[int, Tensor]) -> Tensor:
    """T[c, k]: the mean probability of k on images of c, over the classes that a label may go to.

    One image that is no more this than that class is added to each row, so that no class is ruled out.
    """
    data, request = problem.data, problem.request
    rows = []
    for concept, said in zip(places, _outputs(problem, model, places, features=False), strict=True):
        row = said.logits.double().softmax(1).sum(0) + 1 / len(data.classes)
        row[request.classes] = 0
        if request.kind != "subclasses":
            row[data.concept_class[concept]] = 0
        rows.append(row / row.sum())
    return torch.stack(rows)


def _embeddings(problem: UnlearningProblem, model: nn.Module, places: dict[int, Tensor]) -> Tensor:
    """The transition matrix of ratings that are linear in the cosine of the concepts' mean features.

    The least similar concept has the rating 0, and the concept itself 10, as with `megu_cli.mllm.clip`.
    """
    data, request = problem.data, problem.request
    if not has_head(model, len(data.classes)):
        raise CheckpointError(
            f"transition.from: embeddings takes the features before the model's final layer, and it has none with "
            f"{len(data.classes)} outputs",
            "Set transition.from: confusions, or ratings.",
        )
    outputs = _outputs(problem, model, places, features=True)
    means = functional.normalize(torch.stack([said.features.double().mean(0) for said in outputs]))
    known = list(places)
    ratings = torch.full((len(request.asked), len(data.concepts)), float("nan"), dtype=torch.float64)
    stays = torch.tensor([c not in request.concepts for c in known])
    for row, concept in enumerate(request.asked):
        cosine = means @ means[known.index(concept)]
        compared = stays.clone()
        compared[known.index(concept)] = False
        low = cosine[compared].min()
        scaled = SCALE[1] * (cosine - low) / (1 - low).clamp_min(1e-12)
        ratings[row, torch.tensor(known)[compared]] = scaled[compared]
    return matrix_of(problem, ratings)
