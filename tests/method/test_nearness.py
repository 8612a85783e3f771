"""The transition matrix from the original model, against its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from megu_cli.config import FinetuneConfig, LabelsConfig, NoiseConfig, TransitionConfig
from megu_cli.data import Dataset
from megu_cli.errors import CheckpointError
from megu_cli.method import nearness
from megu_cli.method.problem import UnlearningProblem
from megu_cli.request.resolve import Request, resolve


def problem(data: Dataset, request: Request, **transition) -> UnlearningProblem:
    return UnlearningProblem(
        data, request, TransitionConfig(**transition), LabelsConfig(), NoiseConfig(), FinetuneConfig()
    )


def fixed_request(data: Dataset) -> Request:
    return resolve(data, classes=["b"])


def held_out(data: Dataset, label: int) -> torch.Tensor:
    where = torch.where(data.held_out.labels == label)[0]
    return next(data.held_out.batches([where]))


def test_confusions_are_the_mean_probabilities_of_held_out_images(toy, linear):
    wanted = linear(held_out(toy, 1)).double().softmax(1).sum(0) + 1 / 3
    wanted[1] = 0
    settings = {"from": "confusions", "images": 2}
    matrix = nearness.transition(problem(toy, fixed_request(toy), **settings), linear.eval())
    assert matrix.dtype == torch.float64
    assert matrix[0].tolist() == pytest.approx((wanted / wanted.sum()).tolist())


def test_embeddings_are_a_softmax_over_cosines_of_mean_features(toy, linear):
    means = functional.normalize(torch.stack([held_out(toy, label).flatten(1).double().mean(0) for label in range(3)]))
    cosine = means @ means[1]
    low = min(cosine[0], cosine[2])
    ratings = 10 * (cosine - low) / (1 - low)
    wanted = (ratings[[0, 2]] / 2.0).softmax(0)
    settings = {"from": "embeddings", "images": 2, "temperature": 2.0}
    matrix = nearness.transition(problem(toy, fixed_request(toy), **settings), linear.eval())
    assert matrix[0].tolist() == pytest.approx([float(wanted[0]), 0, float(wanted[1])], abs=1e-6)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_a_subclass_may_go_to_its_own_class_and_an_image_may_not(toy, linear):
    coarse = replace(toy, classes=["ab", "c"], concept_class=torch.tensor([0, 0, 1]))
    split = replace(toy.train, labels=(toy.train.labels == 2).long())
    coarse = replace(coarse, train=split, held_out=replace(toy.held_out, labels=(toy.held_out.labels == 2).long()))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    for source in ("confusions", "embeddings"):
        for request, own in ((resolve(coarse, subclasses=["b"]), True), (resolve(coarse, count=5, seed=1), False)):
            matrix = nearness.transition(problem(coarse, request, **{"from": source}), model)
            owners = coarse.concept_class[torch.tensor(request.asked)]
            assert ((matrix[torch.arange(len(owners)), owners] > 0) == own).all()
            assert matrix.sum(1).tolist() == pytest.approx([1.0] * len(owners))


def test_held_out_images_come_first_then_retained_ones_and_forgotten_ones_last(toy):
    single = resolve(toy, count=20, seed=0)
    number, asked = len(toy.train), single.asked[0]

    def looked_at(request: Request, images: int, source: str = "confusions") -> dict[int, list[int]]:
        found = nearness.images(toy, request, TransitionConfig(**{"from": source, "images": images}))
        return {concept: places.tolist() for concept, places in found.items()}

    unseen = [number + i for i in torch.where(toy.held_out.labels == asked)[0].tolist()]
    some = looked_at(single, 5)[asked]
    assert sorted(some[:2]) == unseen
    assert set(some[2:]) <= set(single.retain.tolist())
    whole = looked_at(fixed_request(toy), 100)[1]
    assert {i for i in whole if i < number} == set(fixed_request(toy).forget.tolist()) - set(toy.withheld.tolist())
    assert looked_at(fixed_request(toy), 3).keys() == {1}
    assert looked_at(fixed_request(toy), 3, "embeddings").keys() == {0, 1, 2}
    before = replace(fixed_request(toy), already=toy.withheld, concepts=[1])
    assert all(i < number for places in looked_at(before, 3, "embeddings").values() for i in places)


def test_a_model_without_a_final_layer_has_confusions_alone(toy):
    class Sums(nn.Module):
        """Three logits without a layer."""

        def forward(self, x):
            return x.flatten(1)[:, :3]

    given = fixed_request(toy)
    assert nearness.transition(problem(toy, given, **{"from": "confusions"}), Sums()).shape == (1, 3)
    with pytest.raises(CheckpointError, match=r"transition\.from: embeddings") as caught:
        nearness.transition(problem(toy, given, **{"from": "embeddings"}), Sums())
    assert "confusions" in caught.value.hint
