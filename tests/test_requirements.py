"""Requirements on figures: what can be asked, and how it is judged."""

from __future__ import annotations

import pytest

from megu_cli.errors import ConfigError
from megu_cli.requirements import judge, parse


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
    assert (good.measured, absent.measured) == ("0.0200", "no such figure without an oracle")
    assert judge(parse(["probe_acc<1"]), evaluation)[0].measured == "no such figure in this run"
    assert judge(parse(["time_ratio_total<0.2"]), evaluation)[0].met
    for text in ("x", "a==1", "a<=b", "a<=1.2.3"):
        with pytest.raises(ConfigError):
            parse([text])
