"""The method's four files against cases with a known answer."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from megu_cli.config import FinetuneConfig, LabelsConfig, NoiseConfig, TrainConfig, TransitionConfig
from megu_cli.data import MemoryImages, Split
from megu_cli.execution import LOCAL, Execution
from megu_cli.execution.processes import SINGLE, Processes
from megu_cli.execution.runtime import seeded
from megu_cli.method.discriminant import Discriminant, thumbnails
from megu_cli.method.finetune import Forgotten, GroupedNoise, finetune
from megu_cli.method.labels import draw_labels, hard_labels, label_scores
from megu_cli.method.noise import train_noise
from megu_cli.method.problem import UnlearningProblem
from megu_cli.method.transition import transition_matrix
from megu_cli.method.unseen import as_unseen, by_concept, ranks, soft_labels
from megu_cli.run.artifacts import state_digest
from megu_cli.training import History

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


NOISE = NoiseConfig(batch=3, steps=60, lr=0.1, penalty=0.01)


def test_noise_moves_towards_its_target_and_away_from_it():
    model, split = Linear().eval(), halves()
    index = torch.where(split.labels == 0)[0]
    before = state_digest(model.state_dict())
    x = next(split.batches([index]))
    assert (model(x).argmax(1) == 0).all()
    group = torch.zeros(len(index), dtype=torch.long)
    towards = train_noise(model, split, index, group, torch.tensor([1]), NOISE, away=False, batch=32, label="positive")
    assert towards.shape == (1, 3, 1, 4, 4)
    assert all((model(x + noise).argmax(1) == 1).all() for noise in towards[0])
    away = train_noise(model, split, index, group, torch.tensor([0]), NOISE, away=True, batch=32, label="positive")
    assert all((model(x + noise).argmax(1) != 0).all() for noise in away[0])
    # The model is as it was: parameters, batch-norm statistics, mode and gradients.
    assert state_digest(model.state_dict()) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("target", "away"), [(1, False), (0, True)], ids=["towards", "away"])
def test_a_noise_alone_is_all_that_the_model_sees(target, away):
    model, split, seen = Linear().eval(), halves(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    index = torch.arange(len(split))
    alone = NOISE.model_copy(update={"input": "alone"})
    noise = train_noise(
        model, split, index, index * 0, torch.tensor([target]), alone, away=away, batch=32, label="positive"
    )
    assert seen[0].shape == (32, 1, 4, 4)
    assert seen[0].abs().max() < 0.1  # the noise at its start: an image has values of 1 and more
    assert next(split.batches([index])).abs().max() > 1
    assert all((model(one[None]).argmax(1) == target) != away for one in noise[0])


def test_noise_of_each_group_has_its_own_target():
    model, split = Linear().eval(), halves()
    index = torch.arange(len(split))
    noise = train_noise(
        model, split, index, 1 - split.labels, torch.tensor([0, 1]), NOISE, away=False, batch=32, label="positive"
    )
    x = next(split.batches([index]))
    flipped = model(x + noise[1 - split.labels, 0]).argmax(1)
    assert torch.equal(flipped, 1 - split.labels)


def test_a_heavier_penalty_makes_smaller_noise():
    model, split = Linear().eval(), halves()
    index = torch.where(split.labels == 0)[0]
    group = torch.zeros(len(index), dtype=torch.long)
    norms = [
        train_noise(
            model,
            split,
            index,
            group,
            torch.tensor([1]),
            NOISE.model_copy(update={"penalty": penalty}),
            away=False,
            batch=32,
            label="positive",
        ).norm()
        for penalty in (0.0, 10.0)
    ]
    assert norms[1] < 0.5 * norms[0]


FINETUNE = {
    "clean": 0.5, "reassign": False, "adversary": 0.0, "epochs": 6, "batch": 10, "lr": 0.05, "weight_decay": 0.0,
}  # fmt: skip


def finetuned(
    model: nn.Module, split: Split, kept: torch.Tensor, request: Forgotten, *, retain_samples: int = 60,
    forget_batch: int = 10, uniform: bool = True, without_images: torch.Tensor | None = None, validate=None,
    execution: Execution = LOCAL, **settings,
) -> History:  # fmt: skip
    return finetune(
        model, split, kept, request, FinetuneConfig(**{**FINETUNE, **settings}), retain_samples=retain_samples,
        forget_batch=forget_batch, weight=1.0, uniform=uniform, without_images=without_images, validate=validate,
        execution=execution,
    )  # fmt: skip


def forgotten(index: torch.Tensor, label: int, prior: list[float], noise: torch.Tensor | None = None) -> Forgotten:
    target = nn.functional.one_hot(torch.full((len(index),), label), 3).float()
    noises = [] if noise is None else [GroupedNoise(noise, torch.zeros(len(index), dtype=torch.long))]
    return Forgotten(index, target, torch.tensor([prior]).expand(len(index), 3).log(), noises)


def test_finetuning_moves_the_forgotten_class_and_keeps_the_other():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    model = Linear()
    history = finetuned(model, split, kept, forgotten(gone, 2, [0, 0.5, 0.5]))
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
        finetuned(model, split, kept, request, reassign=reassign)
        ends[reassign] = model.eval()(next(split.batches([gone]))).argmax(1).unique().tolist()
    assert ends == {False: [1], True: [2]}


def test_finetuning_draws_the_same_from_the_same_seed():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    noise = torch.rand(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def run(seed: int, noise: torch.Tensor | None = noise, **changes) -> str:
        model = Linear()
        request = forgotten(gone, 2, [0, 0.5, 0.5], noise)
        finetuned(model, split, kept, request, execution=Execution(seed=seed), **changes)
        return state_digest(model.state_dict())

    same = run(0)
    torch.rand(7)  # the global generator has no say
    assert run(0) == same
    others = {run(1), run(0, uniform=False), run(0, clean=0.0), run(0, clean=1.0), run(0, noise=None)}
    assert len(others) == 4  # all clean is the same as no noise
    assert same not in others


@pytest.mark.parametrize(
    ("batch", "forget_batch", "accumulate"),
    [
        (12, 8, 4),
        (7, 10, 3),  # a last batch of 4
        (10, 3, 6),  # more slices than forgotten samples: some have none
        (3, 9, 8),  # four slices; some have no retained samples
    ],
)
@pytest.mark.parametrize("adversary", [0.0, 2.0])
def test_a_step_in_slices_is_that_of_the_whole(batch, forget_batch, accumulate, adversary):
    split = signs(hidden=True)
    gone, kept = (torch.where(split.labels[:200] == k)[0] for k in (0, 1))
    noise = torch.rand(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    settings = {"batch": batch, "forget_batch": forget_batch, "adversary": adversary, "reassign": True, "epochs": 2}
    results = []
    for slices in (1, accumulate):
        model = Products()
        with seeded(0, "init"):
            nn.init.normal_(model.head.weight)
            nn.init.zeros_(model.head.bias)
        most = 0

        def note(_, inputs):
            nonlocal most
            most = max(most, len(inputs[0]))

        model.register_forward_pre_hook(note)
        request = forgotten(gone, 1, [0, 0.4, 0.6], noise)
        history = finetuned(model, split, kept, request, retain_samples=40, accumulate=slices, **settings)
        results.append((model.state_dict(), history.loss, most))
    (whole, loss, size), (cut, loss_cut, size_cut) = results
    assert size_cut <= math.ceil(batch / min(accumulate, max(batch, forget_batch) // 2)) + math.ceil(
        forget_batch / min(accumulate, max(batch, forget_batch) // 2)
    )
    assert size_cut < size == batch + forget_batch
    assert loss == pytest.approx(loss_cut, abs=1e-6)
    for key, value in whole.items():
        assert (value - cut[key]).abs().max() < 1e-6


@pytest.mark.parametrize("away", [True, False])
def test_noise_in_slices_is_that_of_the_whole_step_also_with_batch_norm(trained, toy, away):
    index = torch.where(toy.train.labels != 0)[0]
    settings, batches = NoiseConfig(batch=2, steps=5), []
    hook = trained.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    whole, cut = (
        train_noise(
            trained, toy.train, index, torch.arange(len(index)) % 2, torch.tensor([1, 2]), settings, away=away,
            batch=11, label="negative", accumulate=slices,
        )
        for slices in (1, 4)
    )  # fmt: skip
    hook.remove()
    assert batches == [11] * 5 + [2, 3, 3, 3] * 5
    assert (whole - cut).abs().max() < 1e-5


def test_an_adversary_that_looks_first_leaves_batch_norm_as_it_is(trained, task):
    # The look at the whole step is a forward pass in train mode, whose statistics do not count.
    tracked = {}
    for slices in (1, 2):
        model = copy.deepcopy(trained)
        request = forgotten(task.forget, 1, [0, 0.5, 0.5])
        settings = {"adversary": 1.0, "retain_samples": 24, "batch": 12, "epochs": 1, "accumulate": slices}
        finetuned(model, task.split, task.retain, request, **settings)
        tracked[slices] = int(model[1].num_batches_tracked) - int(trained[1].num_batches_tracked)
    assert tracked == {1: 2, 2: 4}


def test_early_stop_follows_validation_accuracy():
    split = halves()
    gone, kept = torch.where(split.labels == 0)[0], torch.where(split.labels == 1)[0]
    scores = iter([0.5, 0.9, 0.8, 0.9, 1.0, 1.0])
    request = forgotten(gone, 2, [0, 0.5, 0.5])
    history = finetuned(Linear(), split, kept, request, validate=lambda _: next(scores), patience=2)
    assert history.validation == [0.5, 0.9, 0.8, 0.9]


def clouds(n: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(3n, 3) features and labels: the forgotten class 1 between 0 and 2, `apart` beside the line through them."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.5, 2.0])
    means = torch.tensor([[-3.0, 0, 0], [0, apart, 0], [3.0, 0, 0]])
    labels = torch.arange(3).repeat(n)
    return means[labels] + spread * torch.randn(3 * n, 3, generator=draw), labels


def test_the_discriminant_is_that_of_normal_distributions_with_one_covariance():
    x, labels = clouds(400, 1.0)
    memory: dict[str, torch.Tensor] = {}
    told = Discriminant(memory, "a", torch.tensor([0, 2]), 3, 1)
    for rows, own in zip(x.split(300), labels.split(300), strict=True):
        told.see(rows, own)

    means = torch.stack([x[labels == k].mean(0) for k in range(3)]).double()
    rest = x.double() - means[labels]
    covariance = rest.T @ rest / (len(x) - 3)
    n, trace, square = len(x) - 3, covariance.trace(), covariance.square().sum()
    shrinkage = (square / 3 + trace**2) / ((n + 1 / 3) * (square - trace**2 / 3))  # Chen et al. 2010, in 3 dimensions
    covariance = (1 - shrinkage) * covariance + shrinkage * trace / 3 * torch.eye(3)
    normal = torch.distributions.MultivariateNormal(means[:, None], covariance)
    own = x[labels == 1][:50].clone().requires_grad_()
    likelihood = normal.log_prob(own.detach().double())  # (3, 50)
    value = likelihood.logsumexp(0) - likelihood[[0, 2]].logsumexp(0)
    loss = told.loss(own)
    assert loss.item() == pytest.approx((value / (1 + value)).mean().item(), rel=1e-4)
    loss.backward()
    assert own.grad is not None
    assert (own.grad[:, 1] > 0).all()  # down to the line between the others
    assert torch.isfinite(told.loss(1e6 * own)).all()


def test_thumbnails_are_means_by_area():
    image = torch.arange(16.0 * 16).reshape(1, 1, 16, 16)
    assert thumbnails(image)[0, 0] == image[0, 0, :2, :2].mean()
    assert thumbnails(torch.zeros(5, 3, 28, 20)).shape == (5, 192)


def test_a_discriminant_counts_what_it_finds_before_it_takes_it_in():
    found = {}
    for apart in (0.0, 5.0):
        told = Discriminant({}, "a", torch.tensor([0, 2]), 3, 1)
        for seed in range(60):
            told.see(*clouds(20, apart, seed))
        found[apart] = told.found.item()
    assert found[5.0] > 0.99
    assert found[0.0] == pytest.approx(0.86, abs=0.06)  # |x| < 1.5, a standard deviation of 1
    # Random labels: none is found but by chance, though the last steps would fit them well.
    told = Discriminant({}, "a", torch.tensor([0, 2]), 3, 0.5)
    draw = torch.Generator().manual_seed(3)
    for _ in range(60):
        told.see(torch.randn(30, 40, generator=draw), torch.arange(30) % 3)
    assert told.found.item() == pytest.approx(1 / 3, abs=0.12)


class Lone(Processes):
    """The first of four processes, the others having no samples."""

    world = 4

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return value / 4


def test_a_discriminant_counts_the_samples_of_all_processes():
    # 60 classes in 32 samples a step: counted in means most would be taken for unseen.
    draw = torch.Generator().manual_seed(0)
    steps = [(torch.randn(32, 5, generator=draw), torch.randint(61, (32,), generator=draw)) for _ in range(30)]
    values = []
    for processes in (SINGLE, Lone()):
        told = Discriminant({}, "a", torch.arange(60), 61, 0.9, Execution(processes=processes))
        for x, labels in steps:
            told.see(x, labels)
        values.append((told.loss(steps[0][0]).item() / processes.world, told.found.item()))
    assert values[0] == pytest.approx(values[1])


class Products(nn.Module):
    """Features |a + b| and |a - b| of the first two pixels: they tell equal signs from unequal, as no pixel does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 8), nn.Linear(8, 3)
        signs = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
        self.body.weight.data = signs.repeat(2, 1)
        self.body.bias.data = torch.tensor([0.1] * 4 + [-0.1] * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.flatten(1)[:, :2]).relu()


def signs(hidden: bool) -> Split:
    """Class 0 has two pixels of equal sign, class 1 of unequal; where it is not hidden, a third pixel says so."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2000, 1, 2, 2), generator=draw).to(torch.uint8)
    first, second = (pixels[:, 0, 0, k] > 127 for k in range(2))
    labels = (first != second).long()
    pixels[:, 0, 1, 0] = 100 if hidden else (labels * 200).to(torch.uint8)
    one = torch.tensor([0.5]).view(1, 1, 1)
    return Split(MemoryImages(pixels), labels, labels, [str(i) for i in range(2000)], one, one / 2, "")


ADVERSARY = {"adversary": 3.0, "retain_samples": 1000, "batch": 50, "forget_batch": 50}


@pytest.mark.parametrize("hidden", [True, False])
def test_the_adversary_takes_away_what_looks_do_not_show(hidden):
    split = signs(hidden)
    labels = split.labels
    gone, kept = torch.where(labels == 0)[0], torch.where(labels == 1)[0]

    share = {}
    for adversary in (0.0, 3.0):
        torch.manual_seed(0)
        model = Products()
        settings = {**ADVERSARY, "adversary": adversary}
        finetuned(model, split, kept, forgotten(gone, 1, [0, 0.5, 0.5]), **settings)
        told = Discriminant({}, "a", torch.tensor([1]), 3, 1)
        with torch.no_grad():
            x = model.features(next(split.batches([torch.arange(2000)])))
        for rows, own in zip(x.split(50), labels.split(50), strict=True):
            told.see(rows, own)
        share[adversary] = told.found.item()
    assert share[0.0] > 0.9
    assert share[3.0] == share[0.0] if not hidden else share[3.0] < share[0.0] - 0.15


@pytest.mark.parametrize(("images", "samples"), [(100, 2000), (500, 4000), (1200, 4500), (50_000, 12_000)])
def test_few_images_are_seen_a_quarter_as_often_as_in_retraining_but_for_very_few(images, samples):
    problem = UnlearningProblem(
        None, SimpleNamespace(retain=range(images)), TransitionConfig(), LabelsConfig(), NoiseConfig(), FinetuneConfig()
    )
    assert problem.retain_samples == samples
    if images > 1000:
        assert samples <= TrainConfig().epochs / 4 * images
