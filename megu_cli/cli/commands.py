"""The commands: each opens a run, asks the pipeline for its stages, and shows what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from megu_cli.cli.console import say
from megu_cli.cli.options import Options, command, possible

if TYPE_CHECKING:
    from megu_cli.config import Config
    from megu_cli.pipeline.engine import Pipeline

_Require = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--require",
        metavar="NAME<=NUMBER",
        help="Exit with 3 unless met, e.g. 'forget_test_acc<=0.02'. Repeatable.",
    ),
]


_MaxSteps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--max-steps", metavar="N", help="Steps of the finetuning at most. [dim]finetune.max_steps[/dim]", min=1
    ),
]


_HEAT_MAP = "similarity.png"


class _Format(str, Enum):
    html = "html"
    md = "md"
    json = "json"


def register(app: typer.Typer) -> None:
    """Add all commands to the app."""
    app.command(rich_help_panel="Start here")(possible(demo))
    app.command(rich_help_panel="Start here")(possible(init))
    app.command(rich_help_panel="The whole pipeline")(command(run))
    app.command(rich_help_panel="The whole pipeline")(command(status))
    app.command(rich_help_panel="The whole pipeline")(command(compare))
    for stage in (train, similarity, labels, noise, finetune, evaluate):
        name = "eval" if stage is evaluate else stage.__name__
        app.command(name, rich_help_panel="One stage at a time")(command(stage))
    app.command(rich_help_panel="Once it is done")(command(report))
    app.command(rich_help_panel="Once it is done")(command(purge))
    app.callback(invoke_without_command=True)(_root)


def _version(show: bool) -> None:
    if show:
        from megu_cli import __version__

        say(f"megu {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The run directory.")] = Path("megu-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no log.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="The traceback of what fails.")] = False,
) -> None:
    """See it work: digits, forget the class 8, compare with retraining. No network, about a minute.

    Example: megu demo -o /tmp/demo
    """
    from megu_cli.config.templates import DEMO
    from megu_cli.run.writing import replacing

    file = out / "megu.yaml"
    if not file.exists():
        # The run directory must be there, and be ours, before the config can lie in it.
        _make(out)
        with replacing(file) as temporary:
            temporary.write_text(DEMO, encoding="utf-8")
    run(Options(config=file, json=as_json, quiet=quiet, verbose=verbose))
    if not (as_json or quiet):
        from megu_cli.cli import tables

        tables.where_next(out)


def init(
    config: Annotated[Path, typer.Option("-c", "--config", metavar="FILE", help="Where to write it.")] = Path(
        "megu.yaml"
    ),
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="A data set by name, such as cifar10: data.name."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="PATH", help="Your own images: a folder, a manifest (.csv), or a saved Hugging Face data set."
        ),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Model: model.name.")] = "torchvision:resnet18",
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Trained weights: model.checkpoint."),
    ] = None,
    classes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--class", metavar="NAME", help="Forget this class. Repeatable."),
    ] = None,
    samples: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="CSV", help="Forget the images listed in this file."),
    ] = None,
    subjects: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--subject", metavar="ID", help="Forget everything of this person. Repeatable."),
    ] = None,
    fraction: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--random", metavar="FRACTION", help="Forget a random share of the training images."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a megu.yaml in which every setting is explained.

    Example: megu init --images photos --checkpoint weights.pth --samples delete.csv
    """
    from megu_cli.config import load_config
    from megu_cli.config.templates import beside, data_at, template
    from megu_cli.errors import ConfigError
    from megu_cli.run.writing import replacing

    if config.exists() and not force:
        raise ConfigError(f"{config} is there already", "Give another name with -c, or overwrite it with --force.")
    given = {"classes": classes or None, "samples": samples, "subjects": subjects or None, "random": fraction}
    if sum(value is not None for value in given.values()) > 1:
        raise ConfigError("give only one of --class, --samples, --subject, --random")
    if data and images:
        raise ConfigError("give only one of --data, --images")
    folder = config.parent
    own = data_at(images, folder) if images else {"name": "imagefolder", "root": "images", "image_size": 224}
    text = template(
        {"name": data} if data else own,
        model,
        beside(checkpoint, folder) if checkpoint else None,
        classes or None,
        beside(samples, folder) if samples else None,
        subjects or None,
        fraction,
    )
    _make(config.parent)
    with replacing(config) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            load_config(temporary)
        except ConfigError as error:
            raise ConfigError(
                error.message.replace(str(temporary), str(config)), f"{config} was not written: give other options."
            ) from None
    say(f"wrote {config}: look through it, then `megu run -c {config} --dry-run`")
    if images:
        say(
            f"Two things are for you to say: data.image_size, as the model was trained (now {own['image_size']}), "
            "and mllm, who rates how similar the classes are (docs/mllm.md)."
        )


def run(options: Options, require: _Require = None, max_steps: _MaxSteps = None) -> None:
    """Run the whole pipeline; what is fresh is kept.

    With --dry-run: what would run, and about what it takes, from timing a few batches of each stage.

    Example: megu run -c megu.yaml --set forget.classes='[Shirt]'
    """
    from megu_cli.cli import tables

    options = options.having("finetune.max_steps", max_steps)
    with _opened(options, require, shared=True) as (pipeline, config):
        if options.dry_run:
            _show(options, _estimated(pipeline, None, options.force), tables.plan)
            return
        pipeline.run(force=options.force)
        notes = pipeline.work.notes
    _show_eval(options, config, notes)


def status(options: Options) -> None:
    """Show what is fresh, stale (and why), missing, corrupt or blocked. Exit code 1 unless all is fresh.

    Example: megu status -o runs/shirt
    """
    from megu_cli.cli import tables
    from megu_cli.pipeline.engine import STAGES

    with _opened(options, write=False) as (pipeline, _):
        states = pipeline.status()
    rows = {
        name: {"status": state.status, "reason": state.reason, "file": STAGES[name].file}
        for name, state in states.items()
    }
    _show(options, {"stages": rows}, tables.status)
    if any(state.status not in ("fresh", "absent") for state in states.values()):
        raise typer.Exit(1)


def compare(
    options: Options,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B,...", help="Methods, by name; without it all there are. [dim]compare.methods[/dim]"),
    ] = None,
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Seeds, counted up from --seed. [dim]compare.seeds[/dim]"),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose every method's settings from an equally small grid first.")
    ] = False,
) -> None:
    """Set MeGU beside retraining and other methods: same data, same original, same oracle, several seeds.

    Example: megu compare --methods megu,neggrad_plus,delete,mask --seeds 3
    """
    from megu_cli.cli import tables
    from megu_cli.compare import Comparison
    from megu_cli.config import changed
    from megu_cli.errors import MeguError

    with _opened(options) as (pipeline, config):
        given = {"methods": [name.strip() for name in methods.split(",")] if methods else None, "seeds": seeds}
        settings = {f"compare.{key}": value for key, value in given.items() if value is not None}
        work = pipeline.work
        work.config = changed(config, settings)
        comparison = Comparison(work, pipeline.say)
        comparison.refuse_foreign(tune, options.force)
        if options.dry_run:
            _show(options, {"plan": _plan(comparison.plan(tune))}, tables.plan)
            return
        result = comparison.run(tune, options.force)
    _show(options, result, tables.comparison)
    if result["failed"]:
        told = "; ".join(f"{name} ({next(iter(seeds.values()))})" for name, seeds in result["failed"].items())
        raise MeguError(f"failed: {told}", "The others' results stand; the same command tries the failed ones again.")


def train(
    options: Options,
    retain_only: Annotated[
        bool, typer.Option("--retain-only", help="Train the oracle: re-initialised, without the forget set.")
    ] = False,
) -> None:
    """Train the original model, or with --retain-only the oracle.

    Example: megu train --retain-only
    """
    _stage(options, ["oracle" if retain_only else "train"])


def similarity(
    options: Options,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Compare the ratings with those in FILE: rank correlation, and where."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the ratings here, and as a heat map in similarity.png.")
    ] = False,
) -> None:
    """Rate how similar the classes' concepts are, and make the transition matrix of it.

    With --dry-run: the calls, images and estimated tokens that it takes, and to which host they go.

    Example: megu similarity --set mllm.backend=endpoint --set mllm.model=llava --dry-run
    """
    from megu_cli.cli import tables
    from megu_cli.run.ownership import refuse_foreign

    names = ["similarity", "transition"]
    if options.dry_run:
        with _opened(options) as (pipeline, _):
            plan = _plan(pipeline.plan(names, options.force))
            if show:
                refuse_foreign(pipeline.work.out, _HEAT_MAP)
            cost = pipeline.work.rating_cost() if plan[0]["action"] == "run" else None
        _show(options, {"plan": plan, "cost": dataclasses.asdict(cost) if cost else None}, tables.rating_cost)
        return
    if against is not None:
        from megu_cli.mllm.agreement import compare
        from megu_cli.mllm.recorded import Recorded

        other = Recorded(against)  # a file that cannot be read is said before anything is asked
    result = _built(options, names, [_HEAT_MAP] if show else [])
    if against is not None:
        body = result["similarity"]
        result["against"] = {
            "file": str(against),
            "rater": other.rater,
            **compare(body["scores"], other.scores),
        }
    if show and result["similarity"]["scores"]:
        from megu_cli.mllm.heatmap import draw

        result["figure"] = draw(result["similarity"], Path(result["similarity"]["file"]).with_name(_HEAT_MAP))
    _show(options, result, tables.similarity)


def labels(options: Options) -> None:
    """Give each forgotten image a semantically near perturbing label.

    Example: megu labels --set labels.mode=hard
    """
    _stage(options, ["labels"])


def noise(options: Options) -> None:
    """Train the positive-negative feature noise pair.

    Example: megu noise --set noise.use=both
    """
    _stage(options, ["noise"])


def finetune(options: Options, max_steps: _MaxSteps = None) -> None:
    """Finetune on perturbed forgotten and retained images; writes the unlearned model.safetensors.

    Example: megu finetune --max-steps 100
    """
    _stage(options.having("finetune.max_steps", max_steps), ["finetune"])


def evaluate(options: Options, require: _Require = None) -> None:
    """Measure the unlearned model beside the original, the masked and (where it is there) the retrained one.

    Example: megu eval --require 'forget_test_acc<=0.02' --require 'avg_gap<=0.03'
    """
    _stage(options, ["eval"], require)


def report(
    options: Options,
    form: Annotated[
        _Format, typer.Option("--format", help="One self-contained page, Markdown, or JSON.")
    ] = _Format.html,
    show_forgotten: Annotated[
        bool, typer.Option("--show-forgotten", help="Show a few of the forgotten images (html only).")
    ] = False,
    require: _Require = None,
) -> None:
    """Write a report that opens from disk: report.html in the run directory.

    Example: megu report --format md
    """
    from megu_cli import report as reports
    from megu_cli.errors import ArtifactError, ConfigError
    from megu_cli.evaluation.requirements import judge, parse
    from megu_cli.pipeline.engine import STAGES
    from megu_cli.run.artifacts import read_body
    from megu_cli.run.ownership import refuse_foreign

    if show_forgotten and form is not _Format.html:
        raise ConfigError(f"--show-forgotten needs --format html: {form.value} holds no pictures")
    with _opened(options, require, write=False) as (pipeline, config):
        state = pipeline.state("eval")
        file = config.out / STAGES["eval"].file
        if state.status not in ("fresh", "blocked") or not file.is_file():
            raise ArtifactError(
                f"no report: {file.name} is {'missing' if state.status == 'blocked' else state.status} "
                f"({state.reason})",
                "Rebuild it with `megu eval`, or everything with `megu run`.",
            )
        notices = []
        if state.status == "blocked":
            # The evaluation can be read where the data are not; whether it still fits them cannot be told there.
            notices.append(f"It could not be checked here whether this evaluation is up to date: {state.reason}.")
        verdicts = judge(parse(config.eval.require), read_body(file))
        refuse_foreign(config.out, f"report.{form.value}")
        if options.dry_run:
            _show(options, {"file": str(config.out / f"report.{form.value}")}, lambda r: say(r["file"]))
            return
        path = reports.write(pipeline.work, verdicts, form=form.value, show_forgotten=show_forgotten, notices=notices)
    for notice in notices:
        say(notice, err=True)
    result = {"file": str(path), "format": form.value, "bytes": path.stat().st_size, "shows_forgotten": show_forgotten}
    _show(options, result, lambda r: say(f"wrote {r['file']} ({r['bytes'] / 1e3:,.0f} kB)"))


def purge(
    options: Options,
    original: Annotated[
        bool, typer.Option("--original", help="Also original.safetensors, the model that `megu train` made.")
    ] = False,
    oracle: Annotated[bool, typer.Option("--oracle", help="Also oracle.safetensors, the retrained model.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Delete what holds traces of the forgotten data, once the result is accepted.

    The unlearned model, the figures and the digests stay. Needs the run directory alone: -o names one whose config or
    data are gone. Example: megu purge --original
    """
    from megu_cli.cli import tables
    from megu_cli.config import load_config
    from megu_cli.pipeline import purge as traces
    from megu_cli.run.writing import locked

    _alone(options)
    out = options.out or load_config(options.config, list(options.set_)).out
    if not (options.force and out.is_dir()):
        traces.check(out)
    with contextlib.nullcontext() if options.dry_run else locked(out):
        going = traces.traces(out, original=original, oracle=oracle)
        result: dict[str, Any] = {
            "deleted": {trace.path.relative_to(out).as_posix(): trace.what for trace in going},
            "kept": traces.kept(out, going),
        }
        if going and not options.dry_run:
            if not yes:
                _confirm(result)
            traces.delete(going)
    _show(options, {**result, "dry_run": options.dry_run}, tables.purge)


def _confirm(result: dict[str, Any]) -> None:
    """Ask on stderr before deleting.

    Raises:
        InputError: There is nobody to ask, or the answer is no.
    """
    from megu_cli.errors import InputError

    for name, what in result["deleted"].items():
        say(f"  {name}: {what}", err=True)
    try:
        sure = typer.confirm("Delete these for good?", err=True)
    except typer.Abort:
        raise InputError("nothing was deleted: the question was not answered", "Say --yes to purge unasked.") from None
    if not sure:
        raise InputError("nothing was deleted")


def _stage(options: Options, names: list[str], require: list[str] | None = None) -> None:
    """The body of every stage's command."""
    from megu_cli.cli import tables

    if options.dry_run:
        with _opened(options, require, shared=True) as (pipeline, _):
            _show(options, _estimated(pipeline, names, options.force), tables.plan)
    elif names == ["eval"]:
        with _opened(options, require, shared=True) as (pipeline, config):
            pipeline.build(names, options.force)
            notes = pipeline.work.notes
        _show_eval(options, config, notes)
    else:
        _show(options, _built(options, names), tables.stages)


def _built(options: Options, names: list[str], beside: Sequence[str] = ()) -> dict[str, Any]:
    """Build stages; what they made, by name. Files that are written beside them must not be the user's."""
    from megu_cli.pipeline.engine import STAGES
    from megu_cli.run.artifacts import read_body
    from megu_cli.run.ownership import refuse_foreign

    with _opened(options, shared=True) as (pipeline, config):
        for file in beside:
            refuse_foreign(config.out, file)
        pipeline.build(names, options.force)
    files = {name: config.out / STAGES[name].file for name in names}
    return {name: {"file": str(file), **read_body(file)} for name, file in files.items()}


def _show_eval(options: Options, config: Config, notes: list[str]) -> None:
    """Print the evaluation, then hold it against the requirements."""
    from megu_cli.cli import tables
    from megu_cli.errors import RequirementError
    from megu_cli.evaluation.requirements import absent, judge, parse
    from megu_cli.pipeline.engine import STAGES
    from megu_cli.run.artifacts import read_body

    evaluation = read_body(config.out / STAGES["eval"].file)
    verdicts = judge(parse(config.eval.require), evaluation)
    result = {name: value for name, value in evaluation.items() if name != "aggregates"}  # for the report alone
    if missing := absent(evaluation):
        result["absent"] = missing
    if verdicts:
        result["requirements"] = [
            {
                "requirement": str(v.requirement),
                "value": v.value if v.value is not None and math.isfinite(v.value) else None,
                "measured": v.measured,
                "met": v.met,
            }
            for v in verdicts
        ]
    _show(options, {**result, "notes": notes} if options.json else result, tables.evaluation)
    missed = [
        f"{v.requirement} is not met: {'there' if v.value is None else v.requirement.name} is {v.measured}"
        for v in verdicts
        if not v.met
    ]
    if missed:
        raise RequirementError("; ".join(missed))


@contextlib.contextmanager
def _opened(
    options: Options, require: list[str] | None = None, write: bool = True, shared: bool = False
) -> Iterator[tuple[Pipeline, Config]]:
    """The pipeline of a call, with the run directory locked for writing unless nothing will be written.

    Several processes may share the work only where a command says so; the first of them locks, writes and prints.

    Raises:
        ConfigError: There are several, and the command is for one.
    """
    from megu_cli.cli.progress import tracker
    from megu_cli.config import load_config
    from megu_cli.evaluation.requirements import parse
    from megu_cli.execution import processes
    from megu_cli.run.writing import locked

    _alone(options, shared)
    first = processes.rank() == 0
    quiet = options.quiet or not first
    overrides = list(options.set_)
    flags = {"out": options.out, "seed": options.seed, "device": options.device}
    config = load_config(options.config, overrides, flags)
    if require:
        config = config.model_copy(
            update={"eval": config.eval.model_copy(update={"require": [*config.eval.require, *require]})}
        )
    parse(config.eval.require)  # a requirement that cannot be read is refused before anything runs

    from megu_cli.pipeline.engine import Pipeline
    from megu_cli.pipeline.workspace import Workspace

    work = Workspace(config, tracker(quiet))
    if options.force:
        work.memo.renew()
    pipeline = Pipeline(work, say=lambda line: None if quiet else say(line, err=True))
    try:
        if not write or options.dry_run:
            yield pipeline, config
            work.keep_memo(only_beside_runs=True)
        else:
            work.check()
            for line in work.notes:
                pipeline.say(line)
            with locked(config.out) if first else contextlib.nullcontext():
                yield pipeline, config
                work.crew.close()
    except KeyboardInterrupt:
        from megu_cli import entry

        entry.say("interrupted; what was finished is kept, and the same command goes on from there")
        raise


def _alone(options: Options, shared: bool = False) -> None:
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


def _estimated(pipeline: Pipeline, names: list[str] | None, force: bool) -> dict[str, Any]:
    """The plan with what it takes, from a few batches of each stage."""
    from megu_cli.pipeline.estimates import planned

    return planned(pipeline.work, _plan(pipeline.plan(names, force)))


def _plan(rows: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [{"stage": stage, "action": action, "reason": reason} for stage, action, reason in rows]


def _show(options: Options, result: dict[str, Any], table: Any) -> None:
    """Print a result on stdout: one JSON object, or a table."""
    from megu_cli.execution.processes import rank
    from megu_cli.text import shown

    if rank() > 0:
        return
    if options.json:
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        table(shown(result))


def _make(folder: Path) -> None:
    """Make a folder.

    Raises:
        ArtifactError: It cannot be made.
    """
    from megu_cli.errors import ArtifactError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror}", "Give another place.") from None
