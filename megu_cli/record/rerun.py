"""A second computation of a recorded run, in a folder of its own, to compare the bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megu_cli import __version__
from megu_cli.config import Config, changed
from megu_cli.execution.runtime import Track, silent
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.record import collect, fingerprints
from megu_cli.record.statement import Statement
from megu_cli.run import artifacts, files


def rerun(
    statement: Statement,
    config: Config,
    requests: Sequence[dict[str, Any]] | None = None,
    track: Track = silent,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Run the pipeline again and name the files that have other bytes than the record says.

    Ratings of a model or a server are taken over from the run directory: a second answer may be another one.

    Args:
        statement: The record's.
        config: That of the run.
        requests: See `fingerprints.keep`.
        track: Reports progress.
        say: Told what runs.
    """
    predicate = statement.predicate
    wrong = []
    for name, there in (("megu", __version__), ("torch", torch.__version__)):
        if (recorded := getattr(predicate.versions, name)) != there:
            wrong.append(f"versions.{name}: the record says {recorded}, here is {there}")
    with tempfile.TemporaryDirectory(prefix="megu-rerun-") as folder:
        out = Path(folder, "run")
        out.mkdir()
        ratings = config.out / files.SIMILARITY
        if config.mllm.rater.asks and ratings.is_file():
            shutil.copy2(ratings, out)
        judged = files.ORACLE in predicate.files or "oracle" in (predicate.figures or {}) or config.retrains
        oracle = config.eval.own_oracle if judged and config.eval.own_oracle else judged
        pipeline = Pipeline(RunContext.open(changed(config, {"out": out, "eval.oracle": oracle}), track), say)
        pipeline.run(goals=None if predicate.figures is not None else ["finetune"])
        fingerprints.keep(pipeline.context, requests)
        for name, digest in predicate.files.items():
            path = out / name
            if name == files.EVALUATION:
                # Its seconds are never the same.
                if collect.figures(artifacts.read_body(path)) != predicate.figures:
                    wrong.append("figures: the second computation gives others")
            elif not artifacts.within(out, path) or not path.is_file():
                wrong.append(f"{name}: the second computation does not write it")
            elif artifacts.file_digest(path) != digest:
                wrong.append(f"{name}: the second computation gives other bytes")
    return wrong
