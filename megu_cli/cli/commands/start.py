"""The commands to begin with: the demo, and a config to start from."""

from __future__ import annotations

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
    from megu_cli.config.json_schema import write_schema
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
    make(config.parent)
    with replacing(config) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            load_config(temporary)
        except ConfigError as error:
            raise ConfigError(
                error.message.replace(str(temporary), str(config)), f"{config} was not written: give other options."
            ) from None
        beside_it = write_schema(folder)
    say(f"wrote {config}: look through it, then `megu run -c {config} --dry-run`")
    say(f"wrote {beside_it}: with it, an editor completes, explains and checks the settings")
    if images:
        say(
            f"Two things are for you to say: data.image_size, as the model was trained (now {own['image_size']}), "
            "and mllm, who rates how similar the classes are (docs/mllm.md)."
        )
