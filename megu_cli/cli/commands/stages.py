"""One stage at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from megu_cli.cli.commands.shared import (
    MaxSteps,
    PerImage,
    Require,
    built,
    check_max_steps,
    check_per_image,
    display,
    estimated,
    keep_per_image,
    opened,
    rows_of,
    show_eval,
)
from megu_cli.cli.console import say
from megu_cli.cli.options import Options
from megu_cli.run.files import HEAT_MAP


def train(
    options: Options,
    retain_only: Annotated[
        bool, typer.Option("--retain-only", help="Train the oracle: re-initialised, without the forget set.")
    ] = False,
) -> None:
    """Train the original model, or with --retain-only the oracle.

    Example: megu train --retain-only
    """
    from megu_cli.config import load_config
    from megu_cli.errors import ConfigError

    if retain_only and (own := load_config(options.config, list(options.set_)).eval.own_oracle):
        raise ConfigError(
            f"eval.oracle names your own retrained model, {own.name}: no evaluation would look at one that megu trains",
            "Set eval.oracle: true to train one here. With your own model there is nothing to train: run `megu eval`.",
        )
    _stage(options, ["oracle" if retain_only else "train"])


def similarity(
    options: Options,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Compare the ratings with those in FILE: rank correlation, and where."),
    ] = None,
    template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write a file of ratings to fill in by hand, and stop."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the ratings here, and as a heat map in similarity.png.")
    ] = False,
) -> None:
    """Rate how similar the classes' concepts are, and make the transition matrix of it.

    With transition.from: confusions or embeddings, make the transition matrix from the original model.

    --template writes the rows that this request needs as a file to fill in by hand, for mllm.ratings.

    With --dry-run: the calls, images and estimated tokens that it takes, and to which host they go.

    Example: megu similarity --set mllm.backend=endpoint --set mllm.model=llava --dry-run
    """
    from megu_cli.cli import tables
    from megu_cli.config import load_config
    from megu_cli.errors import ConfigError
    from megu_cli.run.ownership import refuse_foreign

    if template is not None:
        _write_template(options, template)
        return
    config = load_config(options.config, list(options.set_))
    names = ["similarity", "transition"]
    if not config.takes_ratings and not config.retrains:
        if against is not None or show:
            raise ConfigError(
                f"transition.from: {config.transition.source} takes no ratings: there are none to "
                f"{'show' if show else 'compare'}",
                "Set transition.from: ratings, or leave the option out.",
            )
        _stage(options, ["transition"])
        return
    if options.dry_run:
        with opened(options) as (pipeline, _):
            pipeline.validate(names)
            plan = rows_of(pipeline.plan(names, options.force))
            if show:
                refuse_foreign(pipeline.context.directory.out, HEAT_MAP)
            cost = pipeline.context.inputs.rating_cost() if plan[0]["action"] == "run" else None
        display(options, {"plan": plan, "cost": dataclasses.asdict(cost) if cost else None}, tables.rating_cost)
        return
    if against is not None:
        from megu_cli.mllm.agreement import compare
        from megu_cli.mllm.recorded import Recorded

        other = Recorded(against)  # a file that cannot be read is said before anything is asked
    result = built(options, names, [HEAT_MAP] if show else [])
    if against is not None:
        body = result["similarity"]
        result["against"] = {
            "file": str(against),
            "rater": other.rater,
            **compare(body["scores"], other.scores),
        }
    if show and result["similarity"]["scores"]:
        from megu_cli.mllm.heatmap import draw

        result["figure"] = draw(result["similarity"], Path(result["similarity"]["file"]).with_name(HEAT_MAP))
    display(options, result, tables.similarity)


def _write_template(options: Options, file: Path) -> None:
    """Write the rows of ratings that a request needs, empty.

    Raises:
        ConfigError: The file is there already, and --force is not given.
    """
    import json

    from megu_cli.errors import ConfigError
    from megu_cli.run.writing import replacing

    if file.exists() and not options.force:
        raise ConfigError(f"{file} is there already", "Give another name, or overwrite it with --force.")
    with opened(options, write=False) as (pipeline, _):
        rows = {q.concept: dict.fromkeys(q.candidates) for q in pipeline.context.inputs.questions}
        names = list(pipeline.context.inputs.data.concepts)
    content = {"rater": "who fills this in", "classes": names, "scores": rows}
    number = sum(map(len, rows.values()))
    if not options.dry_run:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    display(
        options,
        {"file": str(file), "numbers": number},
        lambda r: say(
            f"wrote {r['file']}: {r['numbers']:,} numbers from 0 to 10 to fill in (10: hardly distinguishable), each "
            f"in place of a null; then set mllm.ratings: {r['file']}"
        ),
    )


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


def finetune(options: Options, max_steps: MaxSteps = None) -> None:
    """Finetune on perturbed forgotten and retained images; writes the unlearned model.safetensors.

    Example: megu finetune --max-steps 100
    """
    check_max_steps(options, max_steps)
    _stage(options.having("finetune.max_steps", max_steps), ["finetune"])


def evaluate(options: Options, require: Require = None, per_image: PerImage = None) -> None:
    """Measure the unlearned model beside the original, the masked and (where it is there) the retrained one.

    Example: megu eval --require 'forget_test_acc<=0.02' --require 'avg_gap<=0.03'
    """
    from megu_cli.cli import tables

    with opened(options, require, shared=True) as (pipeline, config):
        check_per_image(config, per_image)
        if options.dry_run:
            display(options, estimated(pipeline, ["eval"], options.force), tables.plan)
            return
        pipeline.build(["eval"], options.force)
        keep_per_image(pipeline, per_image)
        notes = pipeline.context.inputs.notes
    show_eval(options, config, notes)


def _stage(options: Options, names: list[str]) -> None:
    """The body of every stage's command."""
    from megu_cli.cli import tables

    if options.dry_run:
        with opened(options, shared=True) as (pipeline, _):
            display(options, estimated(pipeline, names, options.force), tables.plan)
    else:
        display(options, built(options, names), tables.stages)
