"""The verdict without configuration: on cases whose answer is known, and on a run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import binomtest, norm, sem

from megu_cli.errors import ConfigError
from megu_cli.evaluation import distance
from megu_cli.evaluation.requirements import judge, parse
from megu_cli.evaluation.verdict import verdict, wilson


def class_run(**changes):
    """A class whose oracle finds less in the features than the original: changed figures are ``model__figure``."""
    body = {
        "request": {"kind": "classes", "classes": ["Shirt"], "concepts": ["Shirt"], "forget": 600, "retain": 9000},
        "original": {"probe_acc": 0.80},
        "mask": {"probe_acc": 0.80},
        "unlearned": {"probe_acc": 0.60},
        "oracle": {"probe_acc": 0.55},
        "comparison": {
            "original": {"js_divergence": 0.62},
            "mask": {"js_divergence": 0.14},
            "unlearned": {"js_divergence": 0.06},
        },
        "entanglement": {},
    }
    for name, value in changes.items():
        model, figure = name.split("__")
        (body["comparison"] if figure == "js_divergence" else body)[model][figure] = value
    return body


def image_run(original=1.0, unlearned=0.95, oracle=0.93, forget=1000, auc=(0.56, 0.51, 0.5), interval=(0.48, 0.52)):
    names = ("original", "unlearned", "oracle")
    figures = {
        name: {"forget_train_acc": acc, "mia_loss_auc": area, "probe_acc": None}
        for name, acc, area in zip(names, (original, unlearned, oracle), auc, strict=True)
    }
    return {
        "request": {"kind": "random", "classes": [], "concepts": [], "forget": forget, "retain": 9000},
        **figures,
        "mask": figures["original"],
        "intervals": {"oracle": {"mia_loss_auc": list(interval)} if interval else {}},
        "comparison": {},
    }


def word(body, **given):
    return verdict(body, probe_images=given.pop("probe_images", 1000), **given)["verdict"]


def test_a_class_is_forgotten_in_behaviour_and_in_depth():
    found = verdict(class_run(), probe_images=1000)
    assert found["verdict"] == "forgotten"
    assert [(c["name"], c["passed"]) for c in found["checks"]] == [("behaviour", True), ("depth", True)]
    depth = found["checks"][1]
    assert depth["distance"] == pytest.approx(0.05)
    assert depth["margin"] == pytest.approx((0.80 - 0.55) / 2)
    assert found["checks"][0]["margin"] == pytest.approx(0.31)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unlearned__probe_acc": 0.70}, "linear probe still finds"),
        ({"unlearned__js_divergence": 0.40}, "far from the retrained"),
    ],
)
def test_a_class_that_fails_one_check_is_not_forgotten(changes, reason):
    found = verdict(class_run(**changes), probe_images=1000)
    assert found["verdict"] == "not forgotten"
    assert reason in found["reason"]
    assert found["reason"].count("margin") == 1  # the check that passes is no reason


@pytest.mark.parametrize("model", ["mask", "original"])
def test_the_cheat_fails_where_the_probe_still_finds_the_class(model):
    found = verdict(class_run(), model=model, probe_images=1000)
    assert found["verdict"] == "not forgotten"
    assert "linear probe still finds" in found["reason"]


def test_features_below_the_oracles_are_no_fault():
    assert word(class_run(unlearned__probe_acc=0.1)) == "forgotten"


def test_where_the_mask_passes_too_only_nearer_answers_decide():
    body = class_run(**dict.fromkeys(("original__probe_acc", "mask__probe_acc", "unlearned__probe_acc"), 0.56))
    assert word(body, nearer_than_mask=(0.05, 0.1)) == "forgotten"
    assert word(body, nearer_than_mask=(-0.01, 0.1)) == "undecided"
    assert word(body) == "undecided"
    assert word(body, model="mask") == "undecided"
    assert word(body, model="original") == "not forgotten"  # it still names the class


def test_without_an_oracle_it_is_undecided_and_says_what_to_do():
    body = class_run()
    del body["oracle"]
    body["comparison"] = {}
    found = verdict(body, probe_images=1000)
    assert (found["verdict"], found["checks"]) == ("undecided", [])
    assert "megu train --retain-only" in found["reason"]


def test_without_test_images_of_the_class_depth_is_unknown():
    body = class_run(original__probe_acc=None, mask__probe_acc=None, unlearned__probe_acc=None, oracle__probe_acc=None)
    assert word(body, probe_images=0) == "undecided"
    # Features that have left the original's are not enough: no probe has looked for the class in them.
    body["entanglement"] = {
        name: {"cka_forget": x} for name, x in (("original", 1.0), ("unlearned", 0.4), ("oracle", 0.4))
    }
    assert word(body, probe_images=0) == "undecided"
    body["comparison"]["unlearned"]["js_divergence"] = 0.6
    assert word(body, probe_images=0) == "not forgotten"


def test_single_images_are_judged_beside_the_oracle_not_beside_zero():
    assert word(image_run(), probe_images=0) == "forgotten"
    assert word(image_run(unlearned=0.99), probe_images=0) == "not forgotten"  # still learned
    assert word(image_run(unlearned=0.60), probe_images=0) == "not forgotten"  # the forgetting itself shows
    assert word(image_run(), model="original", probe_images=0) == "not forgotten"
    assert word(image_run(), model="mask", probe_images=0) == "not forgotten"
    by_loss = verdict(image_run(auc=(0.56, 0.56, 0.5)), probe_images=0)
    assert by_loss["verdict"] == "not forgotten"
    assert "losses on the forgotten images are smaller" in by_loss["reason"]


def test_all_recognised_before_and_now_is_right_where_the_oracle_recognises_all():
    same = {"original": 1.0, "unlearned": 1.0, "oracle": 1.0, "auc": (0.5, 0.5, 0.5)}
    for number in (3, 1000):
        found = verdict(image_run(**same, forget=number), probe_images=0)
        assert found["verdict"] == "forgotten"
        assert "nothing" in found["reason"]


def test_too_few_images_decide_nothing():
    few = image_run(unlearned=1.0, oracle=2 / 3, forget=3, auc=(0.6, 0.6, 0.5), interval=(0.2, 0.8))
    found = verdict(few, probe_images=0)
    assert found["verdict"] == "undecided"
    assert "3 images" in found["reason"]
    assert word(image_run(interval=None), probe_images=0) == "undecided"  # no unseen images of their classes


def test_the_sampling_error_is_wilsons():
    for share, number in ((0.9, 50), (1.0, 30), (0.0, 12)):
        low, high = binomtest(round(share * number), number).proportion_ci(method="wilson")
        assert wilson(share, number) == pytest.approx((high - low) / 2, abs=1e-4)


def test_the_paired_interval_of_js_distances():
    draw = torch.Generator().manual_seed(0)
    p, other, q = ((3 * torch.randn(400, 5, generator=draw)).softmax(1) for _ in range(3))
    low, high = distance.js_difference(q, other, q)  # the oracle itself
    assert low > 0
    assert (low + high) / 2 == pytest.approx(distance.js_divergence(other, q))
    low, high = distance.js_difference(p, other, q)
    a, b, c = (t.double().numpy() for t in (p, other, q))
    apart = jensenshannon(b, c, axis=1) ** 2 - jensenshannon(a, c, axis=1) ** 2
    assert (low, high) == pytest.approx(norm.interval(0.95, apart.mean(), sem(apart)), abs=1e-5)
    assert distance.js_difference(p, p, q) == (0, 0)
    assert distance.js_difference(p[:1], p[:1], q[:1]) is None
    assert math.isclose(sum(distance.js_difference(p, other, q)), -sum(distance.js_difference(other, p, q)))


def test_a_requirement_on_the_verdict():
    body = {"unlearned": {}, "comparison": {}, "time": {}, "verdict": {"verdict": "undecided"}}
    [outcome] = judge(parse(["verdict=forgotten"]), body)
    assert (outcome.met, outcome.measured, str(outcome.requirement)) == (False, "undecided", "verdict=forgotten")
    body["verdict"]["verdict"] = "not forgotten"
    assert judge(parse(["verdict == not forgotten"]), body)[0].met
    for text in ("verdict=good", "verdict<=1", "verdict"):
        with pytest.raises(ConfigError):
            parse([text])


def test_the_verdict_is_said_and_gates(megu, finished):
    answer = megu("eval", "-c", finished, "--require", "verdict=forgotten", "--json")
    judged = answer.json["verdict"]
    assert judged["verdict"] in ("forgotten", "not forgotten", "undecided")
    assert answer.code == (0 if judged["verdict"] == "forgotten" else 3)
    assert answer.json["requirements"][0]["value"] == judged["verdict"]
    out = " ".join(megu("eval", "-c", finished).out.split())
    assert f"Verdict: {judged['verdict']}: {' '.join(judged['reason'].split())}" in out
    assert megu("report", "-c", finished, "--format", "json", "--json").code == 0


def test_without_an_oracle_the_gate_closes(megu, finished):
    (finished.parent / "run" / "oracle.safetensors").unlink()
    answer = megu("eval", "-c", finished, "--set", "eval.oracle=false", "--force", "--require", "verdict=forgotten")
    assert answer.code == 3
    assert "verdict=forgotten is not met: verdict is undecided" in answer.err
    assert "megu train --retain-only" in answer.out


def test_judging_leaves_the_evaluation_as_it_was():
    body = class_run()
    before = copy.deepcopy(body)
    verdict(body, probe_images=1000)
    assert body == before


def test_the_mask_fails_by_its_features_where_the_probe_tells_nothing():
    """On easy images a probe finds every class in any model's features: that they did not move still shows."""
    body = class_run(**dict.fromkeys(("original__probe_acc", "mask__probe_acc", "unlearned__probe_acc"), 0.56))
    body["entanglement"] = {
        "original": {"cka_forget": 1.0}, "mask": {"cka_forget": 1.0},
        "unlearned": {"cka_forget": 0.90}, "oracle": {"cka_forget": 0.85},
    }  # fmt: skip
    found = verdict(body, probe_images=1000)
    assert found["verdict"] == "forgotten"
    assert [c["margin"] for c in found["checks"] if c["figure"] == "cka_forget"] == [pytest.approx(0.075)]
    cheat = verdict(body, model="mask", probe_images=1000)
    assert cheat["verdict"] == "not forgotten"
    assert "are still the original model's" in cheat["reason"]
    body["entanglement"]["oracle"]["cka_forget"] = 0.97  # a retrained model keeps these features as well
    assert verdict(body, model="unlearned", probe_images=1000)["checks"][1]["passed"]
