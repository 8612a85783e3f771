"""Requirements on the figures of an evaluation, such as ``forget_test_acc<=0.02``: a gate for CI."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megu_cli.errors import ConfigError

_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)
_TESTS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Requirement:
    """One requirement: ``name test bound``."""

    name: str
    test: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.test}{self.bound:g}"


@dataclass(frozen=True)
class Verdict:
    """A requirement, and what was measured; ``value`` is ``None`` where there is no such figure here."""

    requirement: Requirement
    value: float | None

    @property
    def met(self) -> bool:
        """Whether the figure is there and within the bound."""
        requirement = self.requirement
        return self.value is not None and _TESTS[requirement.test](self.value, requirement.bound)


def parse(texts: Iterable[str]) -> list[Requirement]:
    """Parse requirements.

    Raises:
        ConfigError: One is not of the form ``name<=number``.
    """
    result = []
    for text in texts:
        match = _FORM.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            result.append(Requirement(match[1], match[2], float(match[3])))
        except ValueError:
            raise ConfigError(
                f"requirement {text!r} is not of the form name<=number", "For example forget_test_acc<=0.02."
            ) from None
    return result


def judge(requirements: Iterable[Requirement], evaluation: Mapping[str, Any]) -> list[Verdict]:
    """Hold an evaluation, the body of eval.json, against requirements.

    Raises:
        ConfigError: A requirement names no metric.
    """
    figures: dict[str, float | None] = {
        **dict.fromkeys(("js_divergence", "activation_distance", "agreement", "avg_gap", "tow", "label_agreement")),
        **evaluation["unlearned"],
        **evaluation["comparison"].get("unlearned", {}),
        **{name: evaluation["time"].get(name) for name in ("time_ratio", "time_ratio_total", "time_ratio_reached")},
    }
    verdicts = []
    for requirement in requirements:
        if requirement.name not in figures:
            raise ConfigError(
                f"requirement {requirement}: there is no metric {requirement.name}",
                f"Known: {', '.join(figures)}.",
            )
        verdicts.append(Verdict(requirement, figures[requirement.name]))
    return verdicts
