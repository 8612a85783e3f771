"""Metrics: cases with a closed-form answer, and agreement with independent computations on random data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score, roc_curve
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from megu_cli.evaluation import accuracy, distance, entanglement, membership, probe, relearning

PRECISE = 1e-6


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def distributions(draw: torch.Generator, number: int, classes: int = 5, scale: float = 2.0) -> torch.Tensor:
    return (scale * torch.randn(number, classes, generator=draw)).softmax(1)


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_a_classifier_that_is_always_right():
    labels = torch.tensor([0, 2, 1, 2])
    logits = torch.nn.functional.one_hot(labels, 3).float()
    assert accuracy.accuracy(logits.argmax(1), labels) == 1.0
    assert accuracy.per_class_accuracy(logits.argmax(1), labels, 4) == [1.0, 1.0, 1.0, None]
    assert accuracy.accuracy(labels[:0], labels[:0]) is None


def test_accuracy_is_over_samples_and_agrees_with_sklearn(draw):
    logits, labels = torch.randn(101, 5, generator=draw), torch.randint(5, (101,), generator=draw)
    guess = logits.argmax(1)
    assert accuracy.accuracy(guess, labels) == pytest.approx(accuracy_score(labels, guess), abs=PRECISE)
    per_class = recall_score(labels, guess, average=None, labels=range(5))
    assert accuracy.per_class_accuracy(guess, labels, 5) == pytest.approx(per_class.tolist(), abs=PRECISE)


# -- distance to the oracle --------------------------------------------------------------------------------------------


def test_distances_of_two_known_distributions():
    p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert distance.js_divergence(p, q) == pytest.approx(math.log(2), abs=PRECISE)
    assert distance.activation_distance(p, q) == pytest.approx(math.sqrt(2), abs=PRECISE)
    assert distance.agreement(p, q) == 0.0
    assert distance.zrf(p, q) == pytest.approx(0.0, abs=PRECISE)
    half = torch.tensor([[0.5, 0.5]])
    # JS((1,0), (1/2,1/2)) = 3/4 ln(4/3)
    assert distance.js_divergence(p, half) == pytest.approx(0.75 * math.log(4 / 3), abs=PRECISE)


def test_an_oracle_against_itself(draw):
    p = distributions(draw, 20)
    figures = dict.fromkeys((*distance.GAP, "forget_test_acc"), 0.4)
    assert distance.js_divergence(p, p) == 0
    assert distance.activation_distance(p, p) == 0
    assert distance.agreement(p, p) == 1
    assert distance.zrf(p, p) == 1
    assert distance.avg_gap(figures, figures) == 0
    assert distance.tow(figures, figures) == 1
    assert distance.noise_floor([figures, figures, figures]) == 0
    assert distance.label_agreement(p.argmax(1), p) == 1


def test_without_samples_there_is_no_distance():
    none = torch.empty(0, 3)
    for metric in (distance.js_divergence, distance.activation_distance, distance.agreement, distance.zrf):
        assert metric(none, none) is None
    assert distance.label_agreement(none.argmax(1) if len(none) else torch.empty(0), none) is None


def test_distances_agree_with_scipy_and_loops(draw):
    p, q = distributions(draw, 50), distributions(draw, 50)
    js = np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)])
    assert distance.js_divergence(p, q) == pytest.approx(js, abs=PRECISE)
    assert distance.zrf(p, q) == pytest.approx(1 - js / np.log(2), abs=PRECISE)
    lengths = [np.linalg.norm(a - b) for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)]
    assert distance.activation_distance(p, q) == pytest.approx(np.mean(lengths), abs=PRECISE)
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True)) / 50
    assert distance.agreement(p, q) == pytest.approx(same, abs=PRECISE)
    labels = torch.randint(5, (50,), generator=draw)
    hits = sum(int(y) == int(b.argmax()) for y, b in zip(labels, q, strict=True)) / 50
    assert distance.label_agreement(labels, q) == pytest.approx(hits, abs=PRECISE)


def test_gaps_by_hand():
    names = distance.GAP
    oracle = dict.fromkeys(names, 0.5)
    model = dict(zip(names, (0.6, 0.1, 0.5, 0.3), strict=True))
    assert distance.avg_gap(model, oracle) == pytest.approx((0.1 + 0.4 + 0 + 0.2) / 4, abs=PRECISE)
    assert distance.tow(model, oracle) == pytest.approx((1 - 0.4) * (1 - 0.1) * 1, abs=PRECISE)
    others = [dict.fromkeys(names, value) for value in (0.1, 0.2, 0.5)]
    assert distance.noise_floor(others) == pytest.approx((0.1 + 0.4 + 0.3) / 3, abs=PRECISE)
    assert distance.noise_floor(others[:2]) is None
    assert distance.avg_gap({**model, names[0]: None}, oracle) is None
    assert distance.tow({**model, "retain_test_acc": None}, oracle) is None


# -- membership inference ----------------------------------------------------------------------------------------------


def test_entropy_of_known_distributions():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    assert membership.entropy(p).tolist() == pytest.approx([math.log(4), 0.0], abs=PRECISE)


def test_entropy_attack_where_it_is_certain():
    sure, unsure = torch.tensor([[1.0, 0.0]]).repeat(50, 1), torch.tensor([[0.5, 0.5]]).repeat(50, 1)
    sure, unsure = membership.entropy(sure), membership.entropy(unsure)
    assert membership.mia_entropy_lr(sure, unsure, sure) == 1.0
    assert membership.mia_entropy_lr(sure, unsure, unsure) == 0.0


def test_entropy_attacks_agree_with_sklearn(draw):
    retain, test, forget = distributions(draw, 90, scale=4), distributions(draw, 60), distributions(draw, 40, scale=3)

    def entropy(p):
        return -rel_entr(p.double().numpy(), 1).sum(1)[:, None]

    x = np.concatenate([entropy(retain), entropy(test)])
    y = np.repeat([1, 0], [90, 60])
    share = LogisticRegression(class_weight="balanced").fit(x, y).predict(entropy(forget)).mean()
    assert 0 < share < 1
    retain, test, forget = map(membership.entropy, (retain, test, forget))
    assert membership.mia_entropy_lr(retain, test, forget) == pytest.approx(share, abs=PRECISE)
    assert membership.mia_entropy_lr_ssd(retain, test, forget) == pytest.approx(share, abs=PRECISE)


def test_confidence_attack_where_it_is_certain_and_against_sklearn(draw):
    seen, unseen = torch.full((40,), 0.99), torch.full((40,), 0.2)
    assert membership.mia_confidence_svc(seen, unseen, unseen) == 1.0
    assert membership.mia_confidence_svc(seen, unseen, seen) == 0.0
    retain, test = torch.rand(60, generator=draw) ** 0.3, torch.rand(60, generator=draw)
    forget = torch.rand(50, generator=draw) ** 0.6
    x, y = torch.cat([retain, test]).double().numpy()[:, None], np.repeat([1, 0], 60)
    called = SVC(C=3, gamma="auto").fit(x, y).predict(forget.double().numpy()[:, None])
    assert membership.mia_confidence_svc(retain, test, forget) == pytest.approx((called == 0).mean(), abs=PRECISE)
    with pytest.raises(ValueError, match="as many members"):
        membership.mia_confidence_svc(retain, test[:10], forget)


def test_loss_attack_on_known_distributions():
    low, high = torch.zeros(200), torch.ones(200)
    for attack in (membership.mia_loss_auc, membership.mia_loss_lr_auc, membership.mia_loss_tpr_at_1fpr):
        assert attack(low, high) == 1.0
    assert membership.mia_loss_auc(high, low) == 0.0
    assert membership.mia_loss_auc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0, 3.0, 4.0])) == 5.5 / 8
    # Where all losses are equal no attack does better than chance.
    assert membership.mia_loss_auc(low, low) == membership.mia_loss_lr_auc(low, low) == 0.5
    assert membership.mia_loss_tpr_at_1fpr(low, low) == 0.0
    assert membership.mia_loss_auc(low[:1], high) == 1.0
    assert membership.mia_loss_auc(low[:0], high) is None
    assert membership.mia_loss_lr_auc(low[:1], high) is None
    assert membership.mia_loss_tpr_at_1fpr(low, high[:99]) is None


def test_loss_attack_is_at_chance_on_one_distribution(draw):
    losses = torch.rand(4000, generator=draw)
    forget, unseen = losses[:2000], losses[2000:]
    assert membership.mia_loss_auc(forget, unseen) == pytest.approx(0.5, abs=0.03)
    assert membership.mia_loss_lr_auc(forget, unseen) == pytest.approx(0.5, abs=0.03)
    assert membership.mia_loss_tpr_at_1fpr(forget, unseen) == pytest.approx(0.01, abs=0.01)
    low, high = membership.mia_loss_auc_interval(forget, unseen)
    assert low < 0.5 < high


def test_the_raw_attack_keeps_its_direction_where_the_fitted_one_turns(draw):
    """The forgotten images have smaller losses, but for a few huge ones: these turn the fitted attack."""
    forget, unseen = 0.8 * torch.rand(150, generator=draw), torch.rand(40, generator=draw)
    forget[:5] = 50.0
    assert membership.mia_loss_auc(forget, unseen) > 0.55
    assert membership.mia_loss_lr_auc(forget, unseen) < 0.45


def test_the_raw_attack_on_two_normal_distributions(draw):
    """The area of N(0, 1) against N(d, 1) is Phi(d / sqrt 2)."""
    forget, unseen = torch.randn(1500, generator=draw), torch.randn(1500, generator=draw) + 0.5
    area = membership.mia_loss_auc(forget, unseen)
    low, high = membership.mia_loss_auc_interval(forget, unseen)
    assert low < norm.cdf(0.5 / math.sqrt(2)) < high
    assert low < area < high
    # The width, by DeLong's variance of the area.
    wins = (forget[:, None] < unseen).double()
    variance = wins.mean(1).var() / len(forget) + wins.mean(0).var() / len(unseen)
    assert high - low == pytest.approx(2 * 1.96 * variance.sqrt().item(), rel=0.1)
    assert membership.mia_loss_auc_interval(forget, unseen) == (low, high)
    assert membership.mia_loss_auc_interval(forget[:1], unseen) is None


def test_loss_attack_agrees_with_sklearn(draw):
    forget, unseen = torch.rand(300, generator=draw) ** 2, torch.rand(200, generator=draw)
    x = torch.cat([forget, unseen]).double().numpy()[:, None]
    y = np.repeat([1, 0], [300, 200])
    assert membership.mia_loss_auc(forget, unseen) == pytest.approx(
        (forget[:, None] < unseen).double().mean().item(), abs=1e-12
    )
    score, areas = np.zeros(500), []
    for learn, judge in StratifiedKFold(5, shuffle=True, random_state=0).split(x, y):
        attack = LogisticRegression(class_weight="balanced").fit(x[learn], y[learn])
        score[judge] = attack.decision_function(x[judge])
        wins = [(a > b) + 0.5 * (a == b) for a in score[judge][y[judge] == 1] for b in score[judge][y[judge] == 0]]
        areas.append(np.mean(wins))
        assert areas[-1] == pytest.approx(roc_auc_score(y[judge], score[judge]))
    assert membership.mia_loss_lr_auc(forget, unseen) == pytest.approx(np.mean(areas), abs=PRECISE)
    fpr, tpr, _ = roc_curve(y, score, drop_intermediate=False)
    assert membership.mia_loss_tpr_at_1fpr(forget, unseen) == pytest.approx(tpr[fpr <= 0.01].max(), abs=PRECISE)


def test_sample_loss_is_the_cross_entropy_and_stays_finite(draw):
    logits, labels = torch.randn(30, 4, generator=draw).double(), torch.randint(4, (30,), generator=draw)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(
        membership.sample_loss(logits.softmax(1).gather(1, labels[:, None])[:, 0]), expected, atol=PRECISE
    )
    assert membership.sample_loss(torch.tensor([0.0])).tolist() == [50.0]


# -- features ----------------------------------------------------------------------------------------------------------


def test_probe_on_separable_and_on_empty_features(draw):
    labels = torch.arange(90) % 3
    features = 5 * torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(90, 3, generator=draw)
    assert probe.probe_acc(features, labels, features[labels == 2], labels[labels == 2]) == 1.0
    # Features that say nothing: the probe can only guess one class.
    constant = torch.zeros(90, 3)
    assert probe.probe_acc(constant, labels, constant[:30], labels[:30]) == pytest.approx(1 / 3)
    assert probe.probe_acc(features, labels, features[:0], labels[:0]) is None


def test_probe_agrees_with_sklearn(draw):
    labels = torch.randint(3, (200,), generator=draw)
    features = torch.randn(200, 6, generator=draw) + 0.7 * labels[:, None]
    scale = StandardScaler().fit(features[:150].double().numpy())
    model = LogisticRegression(max_iter=1000).fit(scale.transform(features[:150].double().numpy()), labels[:150])
    expected = accuracy_score(labels[150:], model.predict(scale.transform(features[150:].double().numpy())))
    assert probe.probe_acc(features[:150], labels[:150], features[150:], labels[150:]) == pytest.approx(
        expected, abs=PRECISE
    )


def test_entanglement_of_known_features():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    sums = entanglement.class_sums(features, torch.tensor([0, 0, 1, 2]), 4)
    assert sums.tolist() == [[4, 0], [0, 2], [1, 1], [0, 0]]
    assert entanglement.mean_cosine(sums, [0], [1]) == pytest.approx(0.0, abs=PRECISE)
    assert entanglement.mean_cosine(sums, [0], [2]) == pytest.approx(math.sqrt(0.5), abs=PRECISE)
    assert entanglement.mean_cosine(sums, [0], [0]) == pytest.approx(1.0, abs=PRECISE)
    assert entanglement.mean_cosine(sums, [0], [1, 2, 3]) == pytest.approx(math.sqrt(0.5) / 2, abs=PRECISE)
    assert entanglement.mean_cosine(sums, [3], [0]) is None


def test_cka_is_one_under_rotation_and_scale_and_zero_for_unrelated_axes(draw):
    x = torch.randn(80, 6, generator=draw)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
    assert entanglement.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0, abs=PRECISE)
    crossed = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert entanglement.linear_cka(crossed[:, :1], crossed[:, 1:]) == pytest.approx(0.0, abs=PRECISE)
    assert entanglement.linear_cka(torch.ones(5, 2), x[:5]) is None


def test_entanglement_agrees_with_independent_computations(draw):
    x, y = torch.randn(60, 7, generator=draw), torch.randn(60, 4, generator=draw)
    # CKA by centred Gram matrices (HSIC), the other way to write it.
    a, b, h = x.double().numpy(), y.double().numpy(), np.eye(60) - 1 / 60
    k, m = h @ a @ a.T @ h, h @ b @ b.T @ h
    expected = (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())
    assert entanglement.linear_cka(x, y) == pytest.approx(expected, abs=PRECISE)
    labels = torch.arange(60) % 3
    means = np.stack([a[labels.numpy() == c].mean(0) for c in range(3)])
    sums = sum(entanglement.class_sums(x[part], labels[part], 3) for part in torch.arange(60).split(17))
    for rows, columns in (([0], [1, 2]), ([0, 2], [1]), ([0, 1], [0, 1, 2])):
        expected = cosine_similarity(means)[rows][:, columns].mean()
        assert entanglement.mean_cosine(sums, rows, columns) == pytest.approx(expected, abs=PRECISE)


# -- relearning --------------------------------------------------------------------------------------------------------


def test_relearning_counts_epochs_on_a_copy(toy, linear):
    forget = torch.where(toy.train.labels == 0)[0]
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    with torch.no_grad():
        linear[1].bias[0] = -20.0
    start = {key: value.clone() for key, value in linear.state_dict().items()}
    needed = relearning.relearn_epochs(linear, toy.train, forget, 1.0, lr=0.05, limit=50)
    assert needed is not None
    assert needed > 1
    # The same by a plain loop.
    weight, bias = start["1.weight"].clone().requires_grad_(), start["1.bias"].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], 0.05, momentum=0.9)
    x = next(toy.train.batches([forget])).flatten(1)
    y = toy.train.labels[forget]
    epoch = 0
    while ((x @ weight.T + bias).argmax(1) != y).any():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight.T + bias, y).backward()
        optimizer.step()
        epoch += 1
    assert needed == epoch
    assert all(torch.equal(value, start[key]) for key, value in linear.state_dict().items())
    assert not torch.equal(start["1.bias"], before["1.bias"])


def test_a_single_image_is_relearned_with_batch_norm(toy):
    torch.manual_seed(0)
    pixels = toy.train.images[0].numel()
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(pixels, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10)
    )
    assert relearning.relearn_epochs(net, toy.train, torch.tensor([3]), 1.0, lr=1.0, limit=50) is not None


def test_relearning_what_is_known_or_out_of_reach(toy, linear):
    forget = torch.where(toy.train.labels == 0)[0]
    assert relearning.relearn_epochs(linear, toy.train, forget, 0.0) == 0
    with torch.no_grad():
        linear[1].bias[0] = -1e6
    assert relearning.relearn_epochs(linear, toy.train, forget, 1.0, limit=2) is None
