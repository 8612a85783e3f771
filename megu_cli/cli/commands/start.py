"""The commands to begin with: the demo, and a config to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from megu_cli.cli.commands.runs import run
from megu_cli.cli.commands.shared import make
from megu_cli.cli.console import say
from megu_cli.cli.options import Options


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The run directory.")] = Path("megu-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no log.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="The traceback of what fails.")] = False,
) -> None:
    """See it work: digits, forget the class 8, compare with retraining. No network, about a minute.

    Example: megu demo -o /tmp/demo
    """
    from megu_cli.config.json_schema import write_schema
    from megu_cli.config.templates import DEMO
    from megu_cli.run.writing import replacing

    file = out / "megu.yaml"
    if not file.exists():
        # The run directory must be there, and be ours, before the config can lie in it.
        make(out)
        with replacing(file) as temporary:
            temporary.write_text(DEMO, encoding="utf-8")
        write_schema(out)
    run(Options(config=file, json=as_json, quiet=quiet, verbose=verbose))
    if not (as_json or quiet):
        from megu_cli.cli import tables

        tables.where_next(out)


@dataclass(frozen=True)
class InitOptions:
    """The options of `megu init`. Each field declares its flag, default and help."""

    config: Annotated[Path, typer.Option("-c", "--config", metavar="FILE", help="Where to write it.")] = Path(
        "megu.yaml"
    )
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="A data set by name, such as cifar10: data.name."),
    ] = None
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="PATH", help="Your own images: a folder, a manifest (.csv), or a saved Hugging Face data set."
        ),
    ] = None
    image_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--image-size", metavar="PIXELS", min=1, help="Side of the images that the model takes."),
    ] = None
    model: Annotated[str, typer.Option(metavar="NAME", help="Model: model.name.")] = "torchvision:resnet18"
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Trained weights: model.checkpoint. They are checked as by `megu check`."),
    ] = None
    model_classes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="The classes in the order of the model's outputs, a name a line: model.classes."
        ),
    ] = None
    classes: Annotated[list[str], typer.Option("--class", metavar="NAME", help="Forget this class. Repeatable.")] = ()  # type: ignore[assignment]
    samples: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="CSV", help="Forget the images listed in this file."),
    ] = None
    subjects: Annotated[
        list[str], typer.Option("--subject", metavar="ID", help="Forget everything of this person. Repeatable.")
    ] = ()  # type: ignore[assignment]
    fraction: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--random", metavar="FRACTION", help="Forget a random share of the training images."),
    ] = None
    already: Annotated[
        list[Path],
        typer.Option(metavar="PATH", help="An earlier run directory, list or config: forget.already. Repeatable."),
    ] = ()  # type: ignore[assignment]
    ratings: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Ratings of how similar the classes are: mllm.ratings."),
    ] = None
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", metavar="DIR", help="The run directory: out."),
    ] = None
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Try the checkpoint on the images; takes up to some minutes.")
    ] = True
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False


def init(options: InitOptions) -> None:
    """Write a megu.yaml in which every setting is explained.

    With a checkpoint it is tried on the images, and what is found goes into the file.

    Example: megu init --images photos --checkpoint weights.pth --samples delete.csv
    """
    from megu_cli.cli import first_config
    from megu_cli.config.json_schema import refuse_foreign_schema, write_schema
    from megu_cli.errors import ConfigError

    given, config = options, options.config
    if config.exists() and not given.force:
        raise ConfigError(f"{config} is there already", "Give another name with -c, or overwrite it with --force.")
    asked = (given.classes, given.samples, given.subjects, given.fraction)
    if sum(value not in (None, (), []) for value in asked) > 1:
        raise ConfigError("give only one of --class, --samples, --subject, --random")
    if given.data and given.images:
        raise ConfigError("give only one of --data, --images")
    made = first_config.FirstConfig(given)
    make(config.parent)
    refuse_foreign_schema(config.parent)
    made.write()
    beside_it = write_schema(config.parent)
    said = made.complete() if given.images else []
    said += made.earlier()
    for line in said:
        say(line)
    say(f"wrote {config}: look through it, then `megu run -c {config} --dry-run`")
    say(f"wrote {beside_it}: with it, an editor completes, explains and checks the settings")
    if given.images and not given.ratings:
        say("no ratings are needed (mllm.backend: none); what they add, and who can rate: docs/mllm.md")
