"""What the commands share: a run that is opened, a plan, and how a result is shown."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from megu_cli.cli.console import say
from megu_cli.cli.options import Options

if TYPE_CHECKING:
    from megu_cli.config import Config
    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.engine import Pipeline


Require = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--require",
        metavar="NAME<=NUMBER",
        help="Exit with 3 unless met, e.g. 'forget_test_acc<=0.02'. Repeatable.",
    ),
]


MaxSteps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--max-steps", metavar="N", help="Steps of the finetuning at most. [dim]finetune.max_steps[/dim]", min=1
    ),
]


PerImage = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        metavar="FILE.csv", help="Also write what the models say of each forgotten image; the file names the images."
    ),
]


def check_max_steps(options: Options, max_steps: int | None) -> None:
    """See, before anything runs, that --max-steps has a finetuning to limit.

    Raises:
        ConfigError: The result is a retrained model.
    """
    from megu_cli.config import load_config
    from megu_cli.errors import ConfigError

    if max_steps is not None and load_config(options.config, list(options.set_), {"out": options.out}).retrains:
        raise ConfigError(
            "--max-steps does not go with method: retrain, the method of this run",
            "A retraining has no finetuning to cut short: leave out --max-steps, or unlearn with --set method=megu.",
        )


@contextlib.contextmanager
def opened(
    options: Options,
    require: list[str] | None = None,
    write: bool = True,
    shared: bool = False,
    together: bool = False,
) -> Iterator[tuple[Pipeline, Config]]:
    """The pipeline of a call, with the run directory locked for writing unless nothing will be written.

    Several processes may share the work only where a command says so; the first of them locks, writes and prints.
    Commands that write ``together`` may run at the same time; they lock what they write themselves.

    Raises:
        ConfigError: There are several, and the command is for one.
    """
    from megu_cli.cli.progress import tracker
    from megu_cli.config import load_config
    from megu_cli.evaluation.requirements import parse, refuse_unmeasurable
    from megu_cli.execution import processes
    from megu_cli.run.writing import locked

    alone(options, shared)
    first = processes.rank() == 0
    quiet = options.quiet or not first
    overrides = list(options.set_)
    flags = {"out": options.out, "seed": options.seed, "device": options.device}
    config = load_config(options.config, overrides, flags)
    if require:
        config = config.model_copy(
            update={"eval": config.eval.model_copy(update={"require": [*config.eval.require, *require]})}
        )
    # A requirement that cannot be read, or never be met, is refused before anything runs.
    requirements = parse(config.eval.require)
    if write and config.retrains:
        refuse_unmeasurable(requirements)

    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.engine import Pipeline

    context = RunContext.open(config, tracker(quiet))
    if options.force:
        context.directory.renew()
    pipeline = Pipeline(context, say=lambda line: None if quiet else say(line, err=True))
    reports = contextlib.ExitStack()
    if config.tracking.tracker != "none" and first and write and not (together or options.dry_run):
        from megu_cli.pipeline.tracking import Tracker

        pipeline.tracker = Tracker(config, warn=lambda line: say(line, err=True))
        reports.callback(pipeline.tracker.close)
    try:
        if write and options.dry_run:
            pipeline.say("reading the data, the request and the checkpoint")
            readable(context)
            context.check()
        if not write or options.dry_run:
            yield pipeline, config
            context.directory.keep_digests(only_beside_runs=True)
        else:
            readable(context)
            context.check()
            for line in context.inputs.notes:
                pipeline.say(line)
            with reports, locked(config.out, together) if first else contextlib.nullcontext():
                yield pipeline, config
                if first:
                    context.directory.keep_digests(only_beside_runs=True)
                context.runtime.processes.close()
    except KeyboardInterrupt:
        from megu_cli import entry

        entry.say("interrupted; what was finished is kept, and the same command goes on from there")
        raise


def readable(context: RunContext) -> None:
    """See that recorded ratings can be read, and have the rows that the request names, before any data are loaded.

    Raises:
        DataError: They cannot, or have not.
    """
    from megu_cli.errors import DataError, brief
    from megu_cli.pipeline.inputs import recorded

    config = context.config
    if "ratings" not in config.mllm.rater.inputs or config.retrains or not config.takes_ratings:
        return
    known = recorded(context.inputs)
    asked = {str(name) for name in config.forget.classes or config.forget.subclasses or []}
    if missing := sorted(name for name in asked & {*known.classes} if name not in known.scores):
        raise DataError(
            f"recorded ratings {known.path.name}: no row for {', '.join(map(brief, missing[:5]))}",
            "Add what is missing, set mllm.ratings to another file, or do without ratings: mllm.backend: none.",
        )


def alone(options: Options, shared: bool = False) -> None:
    """See that there is one process, unless the command shares its work among several.

    Raises:
        ConfigError: There are several.
    """
    from megu_cli.errors import ConfigError
    from megu_cli.execution.processes import world

    if world() > 1 and (options.dry_run or not shared):
        raise ConfigError(
            "this command is for one process" + (" where --dry-run is given" if shared else ""),
            "Call it without `accelerate launch`, which run, train, noise, finetune and eval can use.",
        )


def built(options: Options, names: list[str], beside: Sequence[str] = ()) -> dict[str, Any]:
    """Build stages; what they made, by name. Files that are written beside them must not be the user's."""
    from megu_cli.pipeline.stages import STAGES
    from megu_cli.record.fingerprints import keep
    from megu_cli.run.artifacts import read_body
    from megu_cli.run.ownership import refuse_foreign

    with opened(options, shared=True) as (pipeline, config):
        for file in beside:
            refuse_foreign(config.out, file)
        pipeline.build(names, options.force)
        if "finetune" in names:
            keep(pipeline.context)
    files = {name: config.out / STAGES[name].file for name in names}
    made = {name: {"file": str(file), **read_body(file)} for name, file in files.items()}
    if "finetune" in made:
        made["finetune"]["models"] = unlearned_files(config.out)
    return made


def unlearned_files(out: Path) -> list[str]:
    """Paths of the unlearned model in a run directory: its files, or the directory for from_pretrained()."""
    from megu_cli.run import files
    from megu_cli.run.artifacts import read_meta

    meta = read_meta(out / files.FINETUNE)
    names = [*meta["weights"], *meta.get("files", {})]
    return [str(out / name) for name in dict.fromkeys(name.split("/")[0] for name in names)]


def check_per_image(config: Config, file: Path | None) -> None:
    """See, before anything runs, that --per-image names a file that may be written."""
    if file is not None:
        from megu_cli.pipeline.per_image import check

        check(file, config.out)


def keep_per_image(pipeline: Pipeline, file: Path | None) -> None:
    """Write the file of --per-image, where one is asked for."""
    if file is not None:
        from megu_cli.pipeline import per_image

        found = per_image.answers(pipeline.context)
        if pipeline.context.runtime.processes.first:
            per_image.write(file, found)
            pipeline.say(f"wrote {file}: {len(found.rows):,} forgotten images by name")


def show_eval(options: Options, config: Config, notes: list[str]) -> None:
    """Print the evaluation, then hold it against the requirements."""
    from megu_cli.cli import tables
    from megu_cli.errors import RequirementError
    from megu_cli.evaluation.requirements import absent, judge, parse
    from megu_cli.pipeline.stages import STAGES
    from megu_cli.run.artifacts import read_body

    evaluation = read_body(config.out / STAGES["eval"].file)
    outcomes = judge(parse(config.eval.require), evaluation)
    result = {name: value for name, value in evaluation.items() if name != "aggregates"}  # for the report alone
    if missing := absent(evaluation):
        result["absent"] = missing
    if outcomes:
        result["requirements"] = [
            {
                "requirement": str(v.requirement),
                "value": None if v.value == math.inf or v.exact else v.value,
                "measured": v.measured,
                "met": v.met,
            }
            for v in outcomes
        ]
    display(options, {**result, "notes": notes} if options.json else result, tables.evaluation)
    missed = [
        f"{v.requirement} is not met: {'there' if v.value is None else v.requirement.name} is {v.measured}"
        for v in outcomes
        if not v.met
    ]
    if missed:
        raise RequirementError("; ".join(missed))


def estimated(pipeline: Pipeline, names: list[str] | None, force: bool) -> dict[str, Any]:
    """The plan with what it takes, from a few batches of each stage."""
    from megu_cli.pipeline.estimates import planned

    pipeline.validate(names)
    return planned(pipeline.context, rows_of(pipeline.plan(names, force)), pipeline.say)


def rows_of(rows: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    """A plan's rows by name."""
    return [{"stage": stage, "action": action, "reason": reason} for stage, action, reason in rows]


def display(options: Options, result: dict[str, Any], table: Any) -> None:
    """Print a result on stdout: one JSON object, or a table."""
    from megu_cli.execution.processes import rank
    from megu_cli.text import shown

    if rank() > 0:
        return
    if options.json:
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        table(shown(result))


def make(folder: Path) -> None:
    """Make a folder.

    Raises:
        ArtifactError: It cannot be made.
    """
    from megu_cli.errors import ArtifactError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror}", "Give another place.") from None
