"""The verdict on an unlearned model: forgotten, not forgotten or undecided.

The model is held against the oracle, the original and the mask. docs/metrics.md explains the checks and their margins.
No setting changes them. A model that was itself retrained from scratch has forgotten by construction, and is not
checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megu_cli.evaluation.registry import find

Word = Literal["forgotten", "not forgotten", "undecided"]
WORDS: tuple[Word, ...] = ("forgotten", "not forgotten", "undecided")
# A model passes a check if its distance from the oracle is at most this share of the original's: nearer to the model
# that never saw the images than to the one that learned them.
SHARE = 0.5
# The least margin of the JS divergence: 5% of its largest value.
JS_MARGIN = 0.05 * math.log(2)
# The least margin of CKA: what two oracles differ by.
CKA_MARGIN = 0.05
# With a sampling error above this, too few images are asked about to say that there was nothing to forget.
TOO_COARSE = 0.05
_Z = 1.96
# The reason for the verdict on a model that was retrained, by who did it: megu, megu from the weights of the user's
# factory, or the user.
_BY_CONSTRUCTION = {
    "megu": "it was retrained from scratch on the retained images alone and never saw the forgotten ones. "
    "That is exact: there is nothing to check.",
    "factory": "it was trained on the retained images alone, from the weights that the factory in model.name returns. "
    "Nothing was checked: megu takes your word that these weights never saw the forgotten images.",
    "user": "it is your own retrained model (eval.oracle). Nothing was checked: megu did not train it, and takes your "
    "word that it never saw the forgotten images.",
}


@dataclass(frozen=True)
class Check:
    """One figure of the verdict.

    Attributes:
        name: What is checked: ``behaviour``, ``depth`` or ``membership``.
        figure: The metric.
        value: Of the unlearned model.
        oracle: Of the oracle; 0 for a distance to it.
        original: Of the original.
        error: Sampling error of the figure, half a 95% interval.
        distance: How far the model is from the oracle, on the side that counts.
        margin: The largest distance that passes.
        passed: True if the distance is within the margin.
    """

    name: Literal["behaviour", "depth", "membership"]
    figure: str
    value: float
    oracle: float
    original: float
    error: float
    distance: float
    margin: float
    passed: bool

    @property
    def telling(self) -> bool:
        """True if the original would not pass: the check can tell forgetting from its absence."""
        return abs(self.original - self.oracle) > self.error


def verdict(
    evaluation: Mapping[str, Any],
    *,
    model: str = "unlearned",
    probe_images: int,
    nearer_than_mask: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Judge whether a model has forgotten.

    Args:
        evaluation: The body of eval.json.
        model: The model to judge.
        probe_images: Images that the probe was tested on.
        nearer_than_mask: 95% interval of the difference JS(mask) - JS(model), both to the oracle, over D_f.

    Returns:
        ``verdict``, one of `WORDS`; ``reason``, one or two sentences; ``checks``, the fields of each `Check`.
    """
    if model == "unlearned" and (by := evaluation.get("retrained_by")):
        return {"verdict": "forgotten", "reason": _BY_CONSTRUCTION[by], "checks": []}
    checks = _checks(evaluation, model, probe_images) if "oracle" in evaluation else []
    word, reason = _decided(evaluation, checks, probe_images, nearer_than_mask)
    return {"verdict": word, "reason": reason, "checks": [asdict(check) for check in checks]}


def wilson(share: float, number: int) -> float:
    """Half the width of Wilson's 95% interval of a share among ``number`` images."""
    return _Z / (1 + _Z**2 / number) * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))


def _whole(evaluation: Mapping[str, Any]) -> bool:
    """True if classes go as a whole: the oracle cannot name them."""
    request = evaluation["request"]
    return bool(request["classes"]) and request["kind"] in ("classes", "subclasses")


def _checks(evaluation: Mapping[str, Any], model: str, probe_images: int) -> list[Check]:
    """The checks that apply to the request and can be measured."""
    figures, original, oracle = evaluation[model], evaluation["original"], evaluation["oracle"]
    checks = []

    def add(name: Any, figure: str, error: float, one_sided: bool = False) -> None:
        value, before, target = figures[figure], original[figure], oracle[figure]
        apart = value - target if one_sided else abs(value - target)
        span = before - target if one_sided else abs(before - target)
        margin = max(error, SHARE * span)
        checks.append(Check(name, figure, value, target, before, error, apart, margin, apart <= margin))

    if _whole(evaluation):
        value, before = (evaluation["comparison"][name]["js_divergence"] for name in (model, "original"))
        margin = max(JS_MARGIN, SHARE * before)
        checks.append(
            Check("behaviour", "js_divergence", value, 0.0, before, JS_MARGIN, value, margin, value <= margin)
        )
        value, before, target = (
            evaluation["entanglement"].get(name, {}).get("cka_forget") for name in (model, "original", "oracle")
        )
        if None not in (value, before, target):
            margin = max(CKA_MARGIN, SHARE * (before - target))
            apart = value - target
            checks.append(
                Check("depth", "cka_forget", value, target, before, CKA_MARGIN, apart, margin, apart <= margin)
            )
    else:
        add("behaviour", "forget_train_acc", wilson(oracle["forget_train_acc"], evaluation["request"]["forget"]))
        ends = evaluation["intervals"]["oracle"].get("mia_loss_auc")
        if ends is not None:
            add("membership", "mia_loss_auc", (ends[1] - ends[0]) / 2)
    if probe_images and None not in (figures["probe_acc"], original["probe_acc"], oracle["probe_acc"]):
        add("depth", "probe_acc", wilson(oracle["probe_acc"], probe_images), one_sided=True)
    return checks


def _decided(
    evaluation: Mapping[str, Any],
    checks: list[Check],
    probe_images: int,
    nearer_than_mask: tuple[float, float] | None,
) -> tuple[Word, str]:
    """The verdict's word and reason."""
    if "oracle" not in evaluation:
        return "undecided", (
            "there is no retrained model to compare with. Run `megu train --retain-only`, then `megu eval`."
        )
    failed = [check for check in checks if not check.passed]
    if failed:
        return "not forgotten", _sentence(failed)
    needed = "probe_acc" if _whole(evaluation) else "mia_loss_auc"
    if needed not in {check.figure for check in checks}:
        missing = "test images of the forgotten classes" if needed == "probe_acc" else "test images of the same classes"
        return "undecided", f"{_sentence(checks)} But {needed} could not be measured: there are no {missing}."
    if _whole(evaluation):
        if all(check.passed for check in _checks(evaluation, "mask", probe_images)):
            return _beyond_the_mask(evaluation, checks, nearer_than_mask)
    elif not any(check.telling for check in checks):
        behaviour = checks[0]
        if behaviour.error > TOO_COARSE and behaviour.original != behaviour.oracle:
            return "undecided", (
                f"the original model already is as near to the retrained one as {evaluation['request']['forget']:,} "
                "images can show. More images would tell more."
            )
        return "forgotten", (
            f"{_sentence(checks)} The original model was not to be told apart from the retrained one "
            "either: these figures show nothing of it that was there to forget."
        )
    return "forgotten", _sentence(checks)


def _beyond_the_mask(
    evaluation: Mapping[str, Any], checks: list[Check], nearer_than_mask: tuple[float, float] | None
) -> tuple[Word, str]:
    """The verdict if the mask passes every check: only answers that are nearer to the oracle's decide."""
    reason = f"{_sentence(checks)} The masked model passes these checks as well"
    if nearer_than_mask and nearer_than_mask[0] > 0:
        distance = evaluation["comparison"]["mask"]["js_divergence"]
        return "forgotten", (
            f"{reason}, but its answers are farther from the retrained model's (JS divergence {distance:.3f})."
        )
    return "undecided", f"{reason} and is as near to the retrained model: they do not tell forgetting from hiding here."


def _sentence(checks: list[Check]) -> str:
    """The checks in one sentence."""
    return "; ".join(_clause(check) for check in checks) + "."


def _clause(check: Check) -> str:
    """A check in words, with its numbers."""
    metric = find(check.figure)
    assert metric is not None
    value, oracle, original = (metric.text(v, 1, "%") for v in (check.value, check.oracle, check.original))
    if check.figure == "js_divergence":
        return (
            f"its answers on the forgotten images are {'near' if check.passed else 'far from'} the retrained model's "
            f"(JS divergence {value}; original {original}; margin {check.margin:.3f})"
        )
    if check.figure == "cka_forget":
        words = (
            "its features of the forgotten images have left the original model's, as a retrained model's do",
            "its features of the forgotten images are still the original model's",
        )[0 if check.passed else 1]
        return f"{words} (CKA {value}; retrained {oracle}; margin {check.margin:.3f})"
    more = check.value > check.oracle
    words = {
        "forget_train_acc": (
            "it recognises about as many forgotten images as the retrained model",
            f"it recognises {'more' if more else 'fewer'} forgotten images than the retrained model",
        ),
        "probe_acc": (
            "a linear probe finds what was forgotten in its features no better than in the retrained model's",
            "a linear probe still finds what was forgotten in its features, better than in the retrained model's",
        ),
        "mia_loss_auc": (
            "its losses on forgotten and on unseen images differ as the retrained model's do",
            f"its losses on the forgotten images are {'smaller' if more else 'larger'} than the retrained model's, set "
            "beside unseen images",
        ),
    }[check.figure][0 if check.passed else 1]
    return f"{words} ({value}; retrained {oracle}; original {original}; margin {100 * check.margin:.1f} points)"
