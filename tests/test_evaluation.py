"""Metrics against closed-form answers and independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from megu_cli.artifacts import state_digest
from megu_cli.baselines.mask import mask
from megu_cli.errors import ConfigError
from megu_cli.evaluation.accuracy import accuracy, per_class_accuracy
from megu_cli.evaluation.distance import agreement, avg_gap, js_divergence, tow
from megu_cli.evaluation.membership import entropy, mia_confidence_svc, mia_entropy_lr
from megu_cli.evaluation.probe import probe_acc
from megu_cli.requirements import judge, parse


def probabilities(number: int, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def test_accuracy():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert accuracy(logits[:0], torch.tensor([], dtype=torch.long)) is None
    assert per_class_accuracy(logits, torch.tensor([0, 1, 1]), 3) == [1.0, 0.5, None]


def test_js_divergence_of_known_distributions():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert js_divergence(one, one) == 0
    assert js_divergence(one, other) == pytest.approx(math.log(2))
    half = torch.tensor([[0.5, 0.5]])
    expected = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert js_divergence(one, half) == pytest.approx(expected)


def test_js_divergence_is_scipys():
    p, q = probabilities(200), probabilities(200, seed=1)
    expected = np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)])
    assert js_divergence(p, q) == pytest.approx(expected, abs=1e-6)


def test_agreement_and_gaps():
    p = probabilities(50)
    assert agreement(p, p) == 1
    assert agreement(torch.eye(2), torch.eye(2).flip(0)) == 0
    oracle = {"retain_train_acc": 0.9, "forget_train_acc": 0.1, "retain_test_acc": 0.8, "mia_entropy_lr": 0.5}
    model = {"retain_train_acc": 1.0, "forget_train_acc": 0.3, "retain_test_acc": 0.8, "mia_entropy_lr": 0.4}
    assert avg_gap(oracle, oracle) == 0
    assert avg_gap(model, oracle) == pytest.approx((0.1 + 0.2 + 0 + 0.1) / 4)
    assert tow(oracle, oracle) == 1
    assert tow(model, oracle) == pytest.approx(0.9 * 0.8 * 1)


def test_entropy():
    assert entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx([0, math.log(2)])


def sure(level: float, number: int) -> torch.Tensor:
    p = torch.full((number, 4), (1 - level) / 3)
    p[:, 0] = level
    return p


def test_an_entropy_attack_that_can_tell_and_one_that_cannot():
    members, others = sure(0.999, 300), sure(0.4, 100)
    assert mia_entropy_lr(members, others, sure(0.999, 50)) == 1
    assert mia_entropy_lr(members, others, sure(0.4, 50)) == 0
    # The same distribution on both sides: the balanced attack is at chance.
    same = probabilities(40000)
    called = mia_entropy_lr(same[:20000], same[20000:30000], same[30000:])
    assert 0.2 < called < 0.8


def test_a_confidence_attack_that_can_tell():
    high, low = torch.linspace(0.9, 1, 100), torch.linspace(0, 0.4, 100)
    assert mia_confidence_svc(high, low, torch.full((10,), 0.99)) == 0
    assert mia_confidence_svc(high, low, torch.full((10,), 0.1)) == 1
    with pytest.raises(ValueError, match="as many members"):
        mia_confidence_svc(high, low[:50], high)


def test_a_probe_finds_what_is_linearly_there():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=draw)
    centres = torch.eye(3).repeat(1, 2) * 6
    features = centres[labels] + torch.randn(600, 6, generator=draw)
    assert probe_acc(features[:500], labels[:500], features[500:], labels[500:]) > 0.97
    blind = torch.randn(600, 6, generator=draw)
    assert probe_acc(blind[:500], labels[:500], blind[500:], labels[500:]) < 0.55
    assert probe_acc(features, labels, features[:0], labels[:0]) is None


def test_the_mask_hides_a_class_and_touches_nothing_else():
    logits = torch.randn(20, 4)
    before = logits.clone()
    masked = mask(logits, [2])
    assert torch.equal(logits, before)
    assert (masked.softmax(1)[:, 2] == 0).all()
    assert torch.equal(mask(logits, []), logits)


def test_an_evaluation_changes_no_model(finished):
    from megu_cli.config import load_config
    from megu_cli.stages import _metrics, _Seen
    from megu_cli.workspace import Workspace

    work = Workspace(load_config(finished))
    model = work.original()
    before = state_digest(model.state_dict())
    _metrics(_Seen.by(model, work, "original"), work)
    assert state_digest(model.state_dict()) == before
    assert not model.training


def test_requirements():
    evaluation = {
        "unlearned": {"forget_test_acc": 0.02},
        "comparison": {},
        "time": {"time_ratio": None, "time_ratio_total": 0.1},
    }
    good, bad, absent = judge(parse(["forget_test_acc <= 2e-2", "forget_test_acc<0.02", "avg_gap<=1"]), evaluation)
    assert good.met
    assert not bad.met
    assert absent.value is None
    assert not absent.met
    assert judge(parse(["time_ratio_total<0.2"]), evaluation)[0].met
    for text in ("x", "a==1", "a<=b", "a<=1.2.3"):
        with pytest.raises(ConfigError):
            parse([text])
