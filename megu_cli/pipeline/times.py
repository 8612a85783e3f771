"""Seconds that stages took, from the log of the run directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megu_cli.pipeline.stages import STAGES, in_group
from megu_cli.run import artifacts
from megu_cli.run.log import RunLog


def seconds(out: Path, log: RunLog, stage: str) -> tuple[float, str] | None:
    """Seconds that the artifact of a stage took, and the machine; ``None`` if the log does not tell."""
    meta = artifacts.read_meta(out / STAGES[stage].file)
    return log.seconds(str(meta["fingerprint"]))


def method_seconds(out: Path, log: RunLog) -> tuple[float, str] | None:
    """Seconds of the method's own stages for the unlearned model, and the machine; ``None`` if not known."""
    last = next(name for name in in_group("method") if STAGES[name].weights)
    meta = artifacts.read_meta(out / STAGES[last].file)
    before = [meta["lineage"][name] for name in in_group("method") if name in meta["lineage"]]
    keys = [entry["fingerprint"] for entry in (*before, meta)]
    known = [entry for key in keys if (entry := log.seconds(key))]
    if len(known) < len(keys) or len({machine for _, machine in known}) != 1:
        return None
    return sum(value for value, _ in known), known[0][1]


def of_models(times: Mapping[str, float | None], retrained: bool = False) -> dict[str, float | None]:
    """Seconds that each model of an evaluation took; ``None`` where not known.

    Args:
        times: The evaluation's `summary`.
        retrained: The unlearned model is the retrained one.
    """
    own = [times.get(f"{stage}_s") for stage in (["oracle"] if retrained else in_group("method"))]
    known = [value for value in own if value is not None]
    return {
        "original": times.get("train_s"),
        "mask": 0.0,
        "unlearned": sum(known) if len(known) == len(own) else None,
        "oracle": times.get("oracle_s"),
    }


def summary(
    log: RunLog, lineage: Mapping[str, Any], oracle: str, validation: Sequence[float] | None
) -> dict[str, float | None]:
    """Seconds of each stage, and the method's as a share of retraining; ``None`` where the log does not tell.

    Args:
        log: The log of the run directory.
        lineage: Stage -> entry with its ``fingerprint``.
        oracle: Name of the stage that retrains.
        validation: Validation accuracy of the oracle after each epoch; ``None``: there is no oracle.
    """
    known = {name: log.seconds(lineage[name]["fingerprint"]) for name in STAGES if name in lineage}
    spent = {name: entry[0] for name, entry in known.items() if entry}
    machines = {entry[1] for entry in known.values() if entry}

    def ratio(names: Iterable[str]) -> float | None:
        if len(machines) != 1 or not spent.get(oracle) or not all(name in spent for name in names):
            return None
        return sum(spent[name] for name in names) / spent[oracle]

    method = ratio(in_group("method"))
    share = reached(validation or [])
    return {
        **{f"{name}_s": value for name, value in spent.items()},
        "time_ratio": method,
        "time_ratio_total": ratio(in_group("ratings", "method")),
        "time_ratio_reached": method / share if method is not None and share else None,
    }


def reached(validation: Sequence[float]) -> float | None:
    """Share of a training after which it first came within 0.2 points of its final validation accuracy.

    A recipe that is longer than necessary flatters the method that is compared with it; this share corrects for it.
    """
    if not validation:
        return None
    first = next(epoch for epoch, value in enumerate(validation) if value >= validation[-1] - 0.002)
    return (first + 1) / len(validation)
