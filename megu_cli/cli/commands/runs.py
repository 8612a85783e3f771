"""The whole pipeline: run it, and see where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from megu_cli.cli.commands.ledger import run_pending
from megu_cli.cli.commands.proof import Day, Sign
from megu_cli.cli.commands.shared import (
    MaxSteps,
    PerImage,
    Require,
    check_max_steps,
    check_per_image,
    display,
    estimated,
    keep_per_image,
    opened,
    show_eval,
    unlearned_files,
)
from megu_cli.cli.console import say
from megu_cli.cli.options import Options


def run(
    options: Options,
    require: Require = None,
    max_steps: MaxSteps = None,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain", help="Train from scratch on the retained images instead; exact. [dim]method: retrain[/dim]"
        ),
    ] = False,
    per_image: PerImage = None,
    ledger: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--ledger", metavar="FILE", help="Do all pending requests of this ledger in one unlearning."),
    ] = None,
    done: Day = None,
    sign: Sign = None,
) -> None:
    """Run the whole pipeline; what is fresh is kept.

    With --dry-run: what would run, and about what it takes, from timing a few batches of each stage. With --ledger: all
    pending requests at once; the record is written, and they are marked done on the day --done.

    With --retrain: the result is the network trained from scratch on the retained images alone. It stays so for later
    commands on this run directory, until --set method=megu.

    Example: megu run -c megu.yaml --set forget.classes='[Shirt]'
    """
    from megu_cli.cli import tables
    from megu_cli.config import parse_override
    from megu_cli.errors import ConfigError
    from megu_cli.execution.processes import rank
    from megu_cli.record.fingerprints import keep

    if retrain and max_steps is not None:
        raise ConfigError("give only one of --retrain, --max-steps", "A retraining has no finetuning to cut short.")
    if retrain and {"method": "megu"} in map(parse_override, options.set_):
        raise ConfigError(
            "give only one of --retrain, --set method=megu", "--retrain retrains; --set method=megu unlearns."
        )
    options = options.having("finetune.max_steps", max_steps).having("method", "retrain" if retrain else None)
    if ledger is not None:
        if per_image is not None:
            raise ConfigError(
                "give only one of --ledger, --per-image",
                "The run that the ledger asks for has a config of its own making.",
            )
        run_pending(options, ledger, done.date() if done else None, sign, require, max_steps)
        return
    check_max_steps(options, max_steps)
    with opened(options, require, shared=True) as (pipeline, config):
        check_per_image(config, per_image)
        if options.dry_run:
            display(options, estimated(pipeline, None, options.force), tables.plan)
            return
        pipeline.run(force=options.force)
        keep_per_image(pipeline, per_image)
        keep(pipeline.context)
        notes = pipeline.context.inputs.notes
    try:
        show_eval(options, config, notes)
    finally:
        if not options.json and rank() == 0:
            for path in unlearned_files(config.out):
                say(f"{'retrained' if config.retrains else 'unlearned'} model: {path}")


def status(options: Options) -> None:
    """Show what is fresh, stale (and why), missing, corrupt or blocked. Exit code 1 unless all is fresh.

    A finished run whose forgotten images are deleted from the data is done: exit code 0.

    Example: megu status -o runs/shirt
    """
    from megu_cli.cli import tables
    from megu_cli.pipeline.stages import STAGES

    with opened(options, write=False) as (pipeline, _):
        states = pipeline.status()
        amiss = any(state.status not in ("fresh", "absent") for state in states.values())
        done = ""
        if amiss:  # what is up to date needs no torch
            from megu_cli.pipeline.finished import images_deleted

            done = images_deleted(pipeline.context)
    rows = {
        name: {"status": state.status, "reason": state.reason, "file": STAGES[name].file}
        for name, state in states.items()
    }
    if done:
        for row in rows.values():
            there = (pipeline.context.directory.out / row["file"]).is_file()
            row |= {"status": "done" if there else "absent", "reason": "images deleted" if there else "not needed"}
    display(options, {"stages": rows, **({"done": done} if done else {})}, tables.status)
    if amiss and not done:
        raise typer.Exit(1)
