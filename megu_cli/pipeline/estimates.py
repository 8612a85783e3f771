"""What a run will take: each stage's own code on a few batches, timed. Nothing is made, and no image is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from megu_cli.errors import MeguError
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.rehearsal import Estimate, Rehearsal
from megu_cli.pipeline.stages import in_group, of_config

# Images to forget that are named.
_NAMED = 5


def estimates(context: RunContext) -> dict[str, Estimate]:
    """Stage -> what it takes, for all stages that the config may have.

    Raises:
        MeguError: Data, request or model are at fault.
    """
    rehearsal = Rehearsal(context)
    return {name: stage.load_estimate()(rehearsal) for name, stage in of_config(context.config).items()}


def described(rows: list[dict[str, Any]], made: Mapping[str, Estimate]) -> dict[str, Any]:
    """The plan with its estimates, their sum over what would run, and the same for retraining.

    Args:
        rows: Stage, action and reason of each stage.
        made: From `estimates`.
    """
    plan = [{**row, **asdict(made[row["stage"]])} for row in rows]
    runs = [made[row["stage"]] for row in rows if row["action"] == "run"]
    known = [estimate.seconds for estimate in runs if estimate.seconds is not None]
    method, retraining = in_group("method"), made[INPUTS["retrained"].made_by]
    # With `method: retrain` there is nothing to compare with retraining.
    unlearning = sum(made[name].seconds or 0.0 for name in method) if made.keys() >= {*method} else None
    return {
        "plan": plan,
        "total": {
            "calls": sum(estimate.calls for estimate in runs),
            "seconds": sum(known),
            "untimed": [row["stage"] for row in plan if row["action"] == "run" and row["seconds"] is None],
            "memory_bytes": max((estimate.memory_bytes or 0 for estimate in runs), default=0),
            "disk_bytes": sum(estimate.disk_bytes for estimate in runs),
        },
        "retraining": asdict(retraining),
        "time_ratio": unlearning / retraining.seconds if retraining.seconds and unlearning is not None else None,
    }


def planned(
    context: RunContext, rows: list[dict[str, Any]], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """`described` of a plan, with what is to be forgotten; nothing is timed where nothing would run.

    Raises:
        MeguError: The data or the request are at fault.
    """
    names, request = context.inputs.data.train.names, context.inputs.request
    first = [names[position] for position in request.forget[:_NAMED].tolist()]
    asked = {"notes": context.inputs.notes, "forget": {"images": len(request.forget), "first": first}}
    if all(row["action"] == "keep" for row in rows):
        total = {"calls": 0, "seconds": 0.0, "untimed": [], "memory_bytes": 0, "disk_bytes": 0}
        return {"plan": rows, "total": total, "note": "Everything is fresh: nothing would run.", **asked}
    say("timing a few batches of each stage; nothing is made")
    try:
        return {**described(rows, estimates(context)), **asked}
    except MeguError as error:
        return {"plan": rows, "note": f"no estimates: {error.message.splitlines()[0]}", **asked}
