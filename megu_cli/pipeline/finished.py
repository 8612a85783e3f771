"""The intended end of a deletion request: the run is finished, and the forgotten images are deleted."""

from __future__ import annotations

import torch

from megu_cli.config import changed
from megu_cli.errors import MeguError
from megu_cli.pipeline import purge
from megu_cli.pipeline.context import RunContext
from megu_cli.request.earlier import recorded
from megu_cli.run import files
from megu_cli.run.artifacts import read_body


def images_deleted(context: RunContext) -> str:
    """How it is known that all forgotten images have left the data of a finished run; empty if they have not.

    The request itself is not read: its list may be deleted as well.
    """
    try:
        purge.check(context.directory.out)
        forgotten = recorded(read_body(context.directory.out / files.FINETUNE)["forgotten"], files.FINETUNE)
    except (MeguError, KeyError):
        return ""
    settings = context.config.data
    place = settings.manifest or settings.root
    if place is not None and not place.exists():
        return f"{place.name} is not there"
    nothing = {"random": {"count": 1}, "already": []}
    try:
        data = RunContext.open(changed(context.config, {"forget": nothing})).inputs.data
    except MeguError:
        return ""
    there = {data.concepts[c] for c in data.train.concepts.unique().tolist()}
    if there & {*forgotten.concepts}:
        return ""
    contents = torch.tensor(forgotten.contents, dtype=torch.int64)
    if len(contents) and torch.isin(data.train.images.contents(), contents).any():
        return ""
    return f"{forgotten.words} not in the data any more"
