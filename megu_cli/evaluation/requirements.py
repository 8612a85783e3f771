"""Requirements on an evaluation, such as ``forget_test_acc<=0.02`` or ``verdict=forgotten``: a gate for CI."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megu_cli.errors import ConfigError, brief
from megu_cli.evaluation.registry import find, metrics
from megu_cli.evaluation.verdict import WORDS

_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)
_VERDICT = re.compile(r"\s*verdict\s*==?\s*(.*?)\s*")
_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def names() -> list[str]:
    """The metrics that a requirement can name."""
    return [metric.name for metric in metrics(place="require")]


def absent(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Metric of the unlearned model that is null -> what it needs, which was not there."""
    figures = evaluation["unlearned"]
    # Single images have no test images that could be forgotten: nothing is missing there.
    apart = () if evaluation.get("request", {}).get("concepts", True) else ("forget_test_acc", "probe_acc")
    needed = {metric.name: metric.needs for metric in metrics("model") if metric.needs and metric.name not in apart}
    return {name: needs for name, needs in needed.items() if figures.get(name, needs) is None}


@dataclass(frozen=True)
class Requirement:
    """One requirement: ``name test bound``. The bound of the verdict is a word, and its test ``=``."""

    name: str
    test: str
    bound: float | str

    def __str__(self) -> str:
        return f"{self.name}{self.test}{self.bound if isinstance(self.bound, str) else f'{self.bound:g}'}"


@dataclass(frozen=True)
class Outcome:
    """A requirement, and what was measured.

    Attributes:
        requirement: The requirement.
        value: The figure; ``None``: there is none here.
        why: Why there is none.
        exact: True if the figure follows from the model being the retrained one, and was not measured.
    """

    requirement: Requirement
    value: float | str | None
    why: str = ""
    exact: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is there and within the bound."""
        requirement = self.requirement
        return self.value is not None and bool(_TESTS[requirement.test](self.value, requirement.bound))

    @property
    def measured(self) -> str:
        """The figure, or why there is none."""
        if self.value is None:
            return f"no such figure {self.why}"
        if self.exact:
            return "not measured: the model is the retrained one"
        if isinstance(self.value, str):
            return self.value
        return "never" if self.value == math.inf else f"{self.value:.4f}"


def parse(texts: Iterable[str]) -> list[Requirement]:
    """Parse requirements.

    Raises:
        ConfigError: One is not of the form ``name<=number``, or names no metric.
    """
    result = []
    for text in texts:
        if match := _VERDICT.fullmatch(text):
            result.append(_on_the_verdict(match[1]))
            continue
        match = _FORM.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            result.append(Requirement(match[1], match[2], float(match[3])))
        except ValueError:
            raise ConfigError(
                f"requirement {brief(text)} is not of the form name<=number",
                "For example forget_test_acc<=0.02, or verdict=forgotten.",
            ) from None
        if result[-1].name not in names():
            raise ConfigError(
                f"requirement {result[-1]}: there is no metric {result[-1].name}", f"Known: {', '.join(names())}."
            )
    return result


def refuse_unmeasurable(requirements: Iterable[Requirement]) -> None:
    """See that a retrained model can meet requirements: it has no time ratio and no perturbing labels.

    Raises:
        ConfigError: Some can never be met, since there is no such figure.
    """
    known = by_construction()
    metrics_of = {r: find(r.name) for r in requirements}
    if never := [str(r) for r, m in metrics_of.items() if m and m.group != "model" and m.name not in known]:
        raise ConfigError(
            f"method: retrain never meets the requirement {', '.join(never)}: a retrained model has no such figure",
            "Take it out of --require and eval.require, or unlearn with --set method=megu.",
        )


def by_construction() -> dict[str, float]:
    """Metrics of the distance to the retrained model -> their value where the model is the retrained one."""
    return {m.name: m.target for m in metrics("comparison") if isinstance(m.target, float)}


def _on_the_verdict(word: str) -> Requirement:
    if word not in WORDS:
        raise ConfigError(f"requirement verdict={brief(word)}: there is no such verdict", f"Known: {', '.join(WORDS)}.")
    return Requirement("verdict", "=", word)


def judge(requirements: Iterable[Requirement], evaluation: Mapping[str, Any]) -> list[Outcome]:
    """Hold an evaluation, the body of eval.json, against requirements."""
    compared = evaluation["comparison"].get("unlearned", {})
    figures = {**evaluation["time"], **compared, **evaluation["unlearned"]}
    if "relearn_epochs" in figures and figures["relearn_epochs"] is None:
        figures["relearn_epochs"] = math.inf  # it was measured: within these epochs the knowledge does not come back

    missing, retrained = absent(evaluation), "retrained_by" in evaluation
    exact = by_construction() if retrained else {}

    def why(name: str) -> str:
        metric = find(name)
        group = metric.group if metric else "model"
        if group == "model":
            return f"without {missing[name]}" if name in missing else "in this run"
        if retrained:
            return "since the model was retrained"
        if not compared:
            return "without an oracle"
        if name == "label_agreement":
            return "without the labels"
        if group != "time":
            return "since one of its metrics is not measured"
        timed = evaluation["time"].get("time_ratio") is not None
        return "since the retraining had no held-out images" if timed else "since both were not timed on one machine"

    figures["verdict"] = evaluation.get("verdict", {}).get("verdict")
    return [Outcome(r, exact.get(r.name, figures.get(r.name)), why(r.name), r.name in exact) for r in requirements]
