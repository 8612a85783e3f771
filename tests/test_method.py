"""The method's four files against cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from megu_cli.artifacts import state_digest
from megu_cli.data import MemoryImages, Split
from megu_cli.method.finetune import Forgotten, finetune, own_features
from megu_cli.method.labels import as_unseen, by_concept, draw_labels, hard_labels, label_scores, ranks, soft_labels
from megu_cli.method.noise import train_noise
from megu_cli.method.transition import transition_matrix

NAN = float("nan")


def test_transition_is_a_softmax_over_the_rest():
    ratings = torch.tensor([[NAN, 2.0, 5.0, 8.0]])
    matrix = transition_matrix(
        ratings, [0], torch.arange(4), classes=4, forgotten=[0], own_class=False, temperature=3.0
    )
    weights = [math.exp(r / 3) for r in (2, 5, 8)]
    assert matrix[0].tolist() == pytest.approx([0, *(w / sum(weights) for w in weights)])


def test_transition_leaves_out_forgotten_classes_and_its_own():
    ratings = torch.tensor([[10.0, 9.0, 9.0, 1.0]])
    matrix = transition_matrix(
        ratings, [0], torch.arange(4), classes=4, forgotten=[0, 1], own_class=False, temperature=1.0
    )
    assert matrix[0, :2].tolist() == [0, 0]
    assert matrix[0, 2] / matrix[0, 3] == pytest.approx(math.exp(8))


def test_a_superclass_is_rated_by_its_nearest_retained_member():
    # Concepts 0 and 1 make class 0, 2 and 3 class 1, 4 class 2; concept 0 is forgotten.
    ratings = torch.tensor([[NAN, 4.0, 6.0, 1.0, 3.0]])
    owner = torch.tensor([0, 0, 1, 1, 2])
    sub = transition_matrix(ratings, [0], owner, classes=3, forgotten=[0], own_class=True, temperature=1.0)
    assert sub[0].tolist() == pytest.approx(torch.tensor([4.0, 6.0, 3.0]).softmax(0).tolist())
    single = transition_matrix(ratings, [0], owner, classes=3, forgotten=[], own_class=False, temperature=1.0)
    assert single[0].tolist() == pytest.approx([0, *torch.tensor([6.0, 3.0]).softmax(0).tolist()])
    with pytest.raises(ValueError, match="no candidate"):
        transition_matrix(ratings, [0], owner, classes=3, forgotten=[0, 2, 3, 4], own_class=False, temperature=1.0)


T_ROWS = torch.tensor([[0.0, 0.5, 0.3, 0.2]]).double()
PREDICTED = torch.tensor([[0.7, 0.05, 0.15, 0.1]]).double()


@pytest.mark.parametrize(
    ("source", "alpha", "expected"),
    [
        ("transition+prediction", 1.0, [0, 0.5 * 0.05, 0.3 * 0.15, 0.2 * 0.1]),
        ("transition+prediction", 0.5, [0, 0.5 * 0.05**0.5, 0.3 * 0.15**0.5, 0.2 * 0.1**0.5]),
        ("transition", 1.0, [0, 0.5, 0.3, 0.2]),
        ("prediction", 0.0, [0, 0.05, 0.15, 0.1]),
        ("random", 1.0, [0, 1, 1, 1]),
    ],
)
def test_label_scores(source, alpha, expected):
    scores = label_scores(T_ROWS, PREDICTED.log(), source, alpha)
    assert scores[0].tolist() == pytest.approx([e / sum(expected) for e in expected])


def test_label_scores_survive_a_certain_model():
    log_probabilities = torch.tensor([[0.0, -900.0, -800.0, -1000.0]])
    scores = label_scores(T_ROWS, log_probabilities, "transition+prediction", 1.0)
    assert scores.isfinite().all()
    assert scores.argmax(1).item() == 2


def test_soft_labels_keep_mass_on_the_true_label():
    soft = soft_labels(torch.tensor([[0.5, 0.3, 0.2]] * 2), torch.tensor([0, 1]), torch.tensor([0.9, 0.0]))
    assert soft[0].tolist() == pytest.approx([0.9, 0.1 * 0.6, 0.1 * 0.4])
    assert soft[1].tolist() == pytest.approx([5 / 7, 0, 2 / 7])


def test_drawn_labels_follow_their_distribution():
    draw = torch.Generator().manual_seed(0)
    drawn = draw_labels(torch.tensor([[0.0, 0.25, 0.75]]).expand(20000, 3), draw)
    assert torch.bincount(drawn, minlength=3).div(20000).tolist() == pytest.approx([0, 0.25, 0.75], abs=0.01)
    even = hard_labels(torch.tensor([[0.0, 0.5, 0.5]]).expand(2000, 3), "random", draw)
    assert set(even.tolist()) == {1, 2}
    assert hard_labels(torch.tensor([[0.1, 0.5, 0.4]]), "transition", draw).tolist() == [1]


def test_held_out_images_speak_for_their_concept():
    values, concepts = torch.tensor([0.9, 0.5, 0.8]), torch.tensor([4, 4, 5])
    told = by_concept(values, concepts, torch.tensor([5, 4, 6]))
    assert told.tolist() == pytest.approx([0.8, 0.7, (0.9 + 0.5 + 0.8) / 3])
    assert by_concept(values > 0.6, concepts, torch.tensor([4])).tolist() == [0.5]


def test_the_least_sure_of_each_concept_rank_first():
    true = torch.tensor([0, 0, 0, 0, 1, 1])
    margins = torch.tensor([3.0, 0.5, -1.0, 2.0, 9.0, 8.0])
    logits = torch.zeros(6, 3)
    logits[torch.arange(6), true] = margins
    assert ranks(logits, true, true).tolist() == [0.875, 0.375, 0.125, 0.625, 0.75, 0.25]


def test_forgotten_samples_are_as_sure_as_held_out_ones_of_their_concept():
    concepts, rank = torch.tensor([0, 0, 0, 1]), torch.tensor([0.0, 0.5, 1.0, 0.5]).double()
    unseen = torch.cat([torch.linspace(0.2, 1, 21), torch.zeros(3)])
    where = torch.tensor([0] * 21 + [1] * 3)
    made = as_unseen(rank, concepts, unseen, where)
    assert made[:3].tolist() == pytest.approx([0.2, 0.6, 1.0])
    assert made[3].item() == pytest.approx(np.median(unseen.double().numpy()))  # three images cannot speak for a class
    many = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    again = as_unseen(torch.linspace(0, 1, 1000).double(), torch.zeros(1000), many, torch.zeros(1000))
    assert torch.allclose(again, many.double().sort()[0])


class Linear(nn.Module):
    """Class 0 where the left half of the image is brighter, class 1 where the right half is, 2 never."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(2, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[4.0, -4.0], [-4.0, 4.0], [0.0, 0.0]]))
            self.head.bias.zero_()

    def forward(self, x):
        x = self.norm(x)
        return self.head(torch.stack([x[:, 0, :, :2].mean((1, 2)), x[:, 0, :, 2:].mean((1, 2))], 1))


def halves(number: int = 60) -> Split:
    """Bright left halves (class 0), bright right halves (class 1)."""
    labels = torch.arange(number) % 2
    pixels = torch.full((number, 1, 4, 4), 60, dtype=torch.uint8)
    pixels[labels == 0, :, :, :2] = 200
    pixels[labels == 1, :, :, 2:] = 200
    pixels += torch.randint(0, 20, pixels.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    one = torch.tensor([0.5]).view(1, 1, 1)
    return Split(MemoryImages(pixels), labels, labels, [str(i) for i in range(number)], one, one / 2, "")


NOISE = {"noises": 3, "steps": 60, "batch": 32, "lr": 0.1, "penalty": 0.01, "seed": 0, "label": "positive"}


def test_noise_moves_towards_its_target_and_away_from_it():
    model, split = Linear().eval(), halves()
    index = torch.where(split.labels == 0)[0]
    before = state_digest(model.state_dict())
    x = next(split.batches([index]))
    assert (model(x).argmax(1) == 0).all()
    group = torch.zeros(len(index), dtype=torch.long)
    towards = train_noise(model, split, index, group, torch.tensor([1]), away=False, **NOISE)
    assert towards.shape == (1, 3, 1, 4, 4)
    assert all((model(x + noise).argmax(1) == 1).all() for noise in towards[0])
    away = train_noise(model, split, index, group, torch.tensor([0]), away=True, **NOISE)
    assert all((model(x + noise).argmax(1) != 0).all() for noise in away[0])
    # The model is as it was: parameters, batch-norm statistics, mode and gradients.
    assert state_digest(model.state_dict()) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_noise_of_each_group_has_its_own_target():
    model, split = Linear().eval(), halves()
    index = torch.arange(len(split))
    noise = train_noise(model, split, index, 1 - split.labels, torch.tensor([0, 1]), away=False, **NOISE)
    x = next(split.batches([index]))
    flipped = model(x + noise[1 - split.labels, 0]).argmax(1)
    assert torch.equal(flipped, 1 - split.labels)


def test_a_heavier_penalty_makes_smaller_noise():
    model, split = Linear().eval(), halves()
    index = torch.where(split.labels == 0)[0]
    group = torch.zeros(len(index), dtype=torch.long)
    norms = [
        train_noise(model, split, index, group, torch.tensor([1]), away=False, **{**NOISE, "penalty": penalty}).norm()
        for penalty in (0.0, 10.0)
    ]
    assert norms[1] < 0.5 * norms[0]


FINETUNE = {
    "positive": None, "negative": None, "uniform": True, "clean": 0.5, "reassign": False, "beta": 0.3,
    "weight": 1.0,
    "align": 0.0, "epochs": 6, "retain_samples": 60, "batch": 10, "forget_batch": 10, "lr": 0.05, "momentum": 0.9,
    "weight_decay": 0.0,
    "seed": 0,
}  # fmt: skip


def forgotten(index: torch.Tensor, label: int, prior: list[float]) -> Forgotten:
    target = nn.functional.one_hot(torch.full((len(index),), label), 3).float()
    zero = torch.zeros(len(index), dtype=torch.long)
    return Forgotten(index, target, torch.tensor([prior]).expand(len(index), 3).log(), zero, zero)


def test_finetuning_moves_the_forgotten_class_and_keeps_the_other():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    model = Linear()
    history = finetune(model, split, kept, forgotten(gone, 2, [0, 0.5, 0.5]), **FINETUNE)
    assert history.steps == 36
    assert history.loss[-1] < history.loss[0]
    model.eval()
    assert (model(next(split.batches([gone]))).argmax(1) == 2).all()
    assert (model(next(split.batches([kept]))).argmax(1) == 1).all()


def test_reassigned_labels_follow_the_model_and_the_prior():
    # The given labels say 1, but the prior allows only 2: reassigned, the forgotten class ends there.
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    ends = {}
    for reassign in (False, True):
        model = Linear()
        request = forgotten(gone, 1, [0, 0, 1.0])
        finetune(model, split, kept, request, **{**FINETUNE, "reassign": reassign})
        ends[reassign] = model.eval()(next(split.batches([gone]))).argmax(1).unique().tolist()
    assert ends == {False: [1], True: [2]}


def test_finetuning_draws_the_same_from_the_same_seed():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    noise = torch.rand(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def run(seed: int, **changes) -> str:
        model = Linear()
        settings = {**FINETUNE, "negative": noise, "seed": seed, **changes}
        finetune(model, split, kept, forgotten(gone, 2, [0, 0.5, 0.5]), **settings)
        return state_digest(model.state_dict())

    same = run(0)
    torch.rand(7)  # the global generator has no say
    assert run(0) == same
    others = {run(1), run(0, uniform=False), run(0, clean=0.0), run(0, clean=1.0), run(0, negative=None)}
    assert len(others) == 4  # all clean is the same as no noise
    assert same not in others


def test_early_stop_follows_validation_accuracy():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    scores = iter([0.5, 0.9, 0.8, 0.9, 1.0, 1.0])
    request = forgotten(gone, 2, [0, 0.5, 0.5])
    history = finetune(Linear(), split, kept, request, validate=lambda _: next(scores), patience=2, **FINETUNE)
    assert history.validation == [0.5, 0.9, 0.8, 0.9]


def test_own_features_are_those_that_no_retained_logit_uses():
    # Two retained classes differ along the first axis; classes 0 and 2 stay, 1 is forgotten.
    weight = torch.tensor([[1.0, 0, 3], [-1.0, 0, 3]])
    retained = torch.tensor([[5.0, 1, 0], [7.0, 3, 0], [-6.0, 0, 4]])
    labels = torch.tensor([0, 0, 2])
    forgotten = torch.tensor([[100.0, 2, 2], [-50.0, 0, 1]], requires_grad=True)
    # Orthogonal to (1, 0, 0): means (2, 0) and (0, 4), spread (1 + 1 + 0) / 3; distances 4 and 9.
    value = own_features(retained, labels, forgotten, torch.tensor([0, 2]), weight, 3)
    assert value.item() == pytest.approx(6.5 / (2 / 3 + 0.65))
    value.backward()
    assert forgotten.grad is not None
    assert forgotten.grad[:, 0].abs().max() < 1e-5
    assert forgotten.grad[0, 2] > 0 > forgotten.grad[1, 2]
    # A label of which the batch has no retained sample does not count.
    lone = own_features(retained, labels, forgotten, torch.tensor([0, 1]), weight, 3)
    assert lone.item() == pytest.approx(4 / (2 / 3 + 0.4))
    # No room beside the retained logits.
    full = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert own_features(retained, labels, forgotten, labels[:2], full, 5).item() == 0


def test_own_features_are_told_by_the_head_that_gives_the_logits():
    class Headed(nn.Module):
        def __init__(self, spare):
            super().__init__()
            self.body = nn.Linear(16, 6)
            self.head = nn.Linear(6, 3)
            if spare:  # declared later, and of no use
                self.spare = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)))

    states, index = [], torch.arange(60)
    forgotten = Forgotten(index[:20:2], torch.eye(3)[[1] * 10], torch.zeros(10, 3), index[:10] * 0, index[:10] * 0)
    for spare in (False, True):
        torch.manual_seed(0)
        model = Headed(spare)
        finetune(
            model, halves(), index[20:], forgotten, positive=None, negative=None, uniform=True, clean=1,
            reassign=False, beta=0, weight=1, align=1, epochs=2, retain_samples=40, batch=10,
            forget_batch=10, lr=0.05, momentum=0.9, weight_decay=0, seed=0,
        )  # fmt: skip
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
