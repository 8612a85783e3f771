"""Stage 1: from similarity ratings to the transition matrix (MeGU, arXiv:2602.17088)."""

from __future__ import annotations

import torch
from torch import Tensor

from megu_cli.method.problem import UnlearningProblem


def matrix_of(problem: UnlearningProblem, ratings: Tensor) -> Tensor:
    """The `transition_matrix` of a request, from (len(asked), F) ratings of its concepts."""
    data, request = problem.data, problem.request
    return transition_matrix(
        ratings,
        request.asked,
        data.concept_class,
        classes=len(data.classes),
        forgotten=request.concepts,
        own_class=request.kind == "subclasses",
        temperature=problem.transition.temperature,
    )


def transition_matrix(
    ratings: Tensor,
    asked: list[int],
    concept_class: Tensor,
    *,
    classes: int,
    forgotten: list[int],
    own_class: bool,
    temperature: float,
) -> Tensor:
    """The transition matrix: T[c, k] = softmax over k of rating(c, k) / temperature.

    A class's rating is the maximum over its retained concepts. T is 0 for wholly forgotten classes and, unless
    ``own_class``, for the class that the asked concept belongs to.

    Args:
        ratings: (len(asked), F) from 0 to 10, concept by concept; NaN where there is none.
        asked: The rows' concepts.
        concept_class: (F,) class of each concept.
        classes: Number of classes K.
        forgotten: Wholly forgotten concepts.
        own_class: Whether a row may point at its own class: for a forgotten sub-class, whose siblings remain.
        temperature: tau > 0, in rating points; high is flat, low is a choice of the best.

    Returns:
        (len(asked), K) float64, each row summing to 1.

    Raises:
        ValueError: A row has no candidate left.
    """
    usable = ratings.double().clone()
    usable[:, forgotten] = float("nan")
    scores = torch.full((len(asked), classes), float("-inf"), dtype=torch.float64)
    for row, concept in enumerate(asked):
        usable[row, concept] = float("nan")
        rated = usable[row].nan_to_num(float("-inf"), neginf=float("-inf")) / temperature
        scores[row].scatter_reduce_(0, concept_class, rated, "amax")
        if not own_class:
            scores[row, concept_class[concept]] = float("-inf")
        if scores[row].isneginf().all():
            raise ValueError(f"row {concept} has no candidate class")
    return scores.softmax(1)
