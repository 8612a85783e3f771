"""Requirements on figures: what can be asked, and how it is judged."""

from __future__ import annotations

import pytest

from megu_cli.errors import ConfigError
from megu_cli.evaluation.requirements import absent, judge, parse


def test_requirements():
    evaluation = {
        "unlearned": {"forget_test_acc": 0.02},
        "comparison": {},
        "time": {"time_ratio": None, "time_ratio_total": 0.1},
    }
    good, bad, lacking = judge(parse(["forget_test_acc <= 2e-2", "forget_test_acc<0.02", "avg_gap<=1"]), evaluation)
    assert good.met
    assert not bad.met
    assert lacking.value is None
    assert not lacking.met
    assert (good.measured, lacking.measured) == ("0.0200", "no such figure without an oracle")
    assert judge(parse(["probe_acc<1"]), evaluation)[0].measured == "no such figure in this run"
    assert judge(parse(["time_ratio_total<0.2"]), evaluation)[0].met
    assert judge(parse(["time_ratio<1"]), evaluation)[0].measured == "no such figure without an oracle"
    beside = {**evaluation, "comparison": {"unlearned": {"avg_gap": 0.1}}}
    late = judge(parse(["time_ratio_reached<1"]), {**beside, "time": {"time_ratio": 0.1}})[0]
    assert late.measured == "no such figure since the retraining had no held-out images"
    told = [verdict.measured for verdict in judge(parse(["time_ratio<1", "label_agreement>0.5"]), beside)]
    assert told == ["no such figure since both were not timed on one machine", "no such figure without the labels"]
    for text in ("x", "a==1", "a<=b", "a<=1.2.3"):
        with pytest.raises(ConfigError):
            parse([text])


def test_a_metric_that_is_null_says_what_it_needs():
    figures = {"unlearned": {"probe_acc": None, "mia_confidence_svc": None}, "comparison": {}, "time": {}}
    probe, attack = judge(parse(["probe_acc<1", "mia_confidence_svc<1"]), figures)
    assert "eval.probe_samples" in probe.measured
    assert "eval.attack_samples" in attack.measured
    assert set(absent(figures)) == {"probe_acc", "mia_confidence_svc"}
    assert set(absent({**figures, "request": {"concepts": []}})) == {"mia_confidence_svc"}


def test_what_never_comes_back_is_later_than_any_bound():
    evaluation = {"unlearned": {"relearn_epochs": None}, "comparison": {}, "time": {}}
    late, soon = judge(parse(["relearn_epochs>=5", "relearn_epochs<=5"]), evaluation)
    assert late.met
    assert not soon.met
    assert late.measured == "never"
    evaluation["unlearned"] = {}  # it was not asked for
    assert not judge(parse(["relearn_epochs>=5"]), evaluation)[0].met
