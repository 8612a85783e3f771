"""The answers of the models image by image: a CSV file of the forgotten images, for the user's own eyes.

It names images, so it is written where the user says, and never into the run directory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megu_cli.errors import ConfigError
from megu_cli.pipeline import retrained
from megu_cli.pipeline.context import RunContext
from megu_cli.run import artifacts, files, writing
from megu_cli.run.ownership import refuse_other

_FIRST = ("image", "class", "copy")
_OF_EACH_MODEL = ("class", "probability", "right")


@dataclass(frozen=True)
class PerImage:
    """The rows of a file.

    Attributes:
        models: Names of the models.
        rows: One for each forgotten image, in order of position.
    """

    models: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """The file's content."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*_FIRST, *(f"{model}_{column}" for model in self.models for column in _OF_EACH_MODEL)])
        writer.writerows(self.rows)
        return stream.getvalue()


def check(path: Path, out: Path) -> None:
    """See that the file may be written: it is not there, or it is such a file, and not in the run directory.

    Raises:
        ConfigError: It may not.
    """
    if path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--per-image {path} lies in the run directory",
            "The file names the forgotten images, and a run directory is handed over. Give a path elsewhere.",
        )
    first = f"{','.join(_FIRST)},original_".encode()
    refuse_other(
        "--per-image", path, lambda stream: stream.readline(200).startswith(first), "no such file", "Give another name."
    )


def answers(context: RunContext) -> PerImage:
    """Ask the original, the unlearned and, where the evaluation has one, the retrained model about D_f.

    All processes of a run call it together. The evaluation must be up to date.
    """
    from megu_cli.training import predict

    context.runtime.start()
    data, request = context.inputs.data, context.inputs.request
    index, labels = request.forget, data.train.labels[request.forget]
    copies = {*request.copies.tolist()}
    rows = [
        [data.train.names[position], data.classes[label], "yes" if position in copies else "no"]
        for position, label in zip(index.tolist(), labels.tolist(), strict=True)
    ]
    models = {"original": context.original, "retrained" if context.config.retrains else "unlearned": context.unlearned}
    if context.config.retrains:
        pass  # the retrained model is the result
    elif context.config.eval.own_oracle:
        models["retrained"] = lambda: context.load(retrained.weights(context.inputs), "eval.oracle")
    elif "oracle" in artifacts.read_meta(context.directory.out / files.EVALUATION)["inputs"]:
        models["retrained"] = lambda: context.load(
            artifacts.read(context.directory.out / files.ORACLE).tensors, files.ORACLE
        )
    for name, load in models.items():
        said = predict(
            load(),
            data.train,
            index,
            classes=len(data.classes),
            features=False,
            label=f"per image {name}",
            execution=context.execution,
        )
        probabilities = said.logits.softmax(1).gather(1, labels[:, None])[:, 0].tolist()
        for row, k, p, label in zip(rows, said.logits.argmax(1).tolist(), probabilities, labels.tolist(), strict=True):
            row += [data.classes[k], f"{p:.6f}", "yes" if k == label else "no"]
    return PerImage(list(models), rows)


def write(path: Path, found: PerImage) -> None:
    """Write the file.

    Raises:
        ArtifactError: It cannot be written.
    """
    with writing.replacing(path) as temporary:
        temporary.write_text(found.text(), encoding="utf-8")
