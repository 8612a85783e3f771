"""Purge: delete what holds traces of the forgotten data, once the result is accepted."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from megu_cli.artifacts import within
from megu_cli.errors import ArtifactError
from megu_cli.report import SHOWS_FORGOTTEN
from megu_cli.resume import resume_file

_TRACES = {
    "labels.safetensors": "positions of the forgotten images and their perturbing labels",
    "noise.safetensors": "noises that were trained on images, or made to carry a forgotten class",
    "similarity.answers.jsonl": "raw answers about images",
    ".digests.npy": "digests of the image files",
    **{
        resume_file(stage): f"what a {stage} that was cut short would go on from"
        for stage in ("train", "oracle", "finetune")
    },
}
_MODELS = {
    "original.safetensors": "the model that still knows what was to be forgotten",
    "oracle.safetensors": "the retrained model",
}
KEPT = (
    *("model/model.safetensors", "model.pth", "model.pt", "model.ckpt", "model.bin"),
    "model.safetensors",
    "finetune.json",
    "eval.json",
    "similarity.json",
    "transition.safetensors",
    "runs.jsonl",
    "report.html",
    "report.md",
    "report.json",
    "compare.json",
    *_MODELS,
)


@dataclass(frozen=True)
class Trace:
    """A file that is to go."""

    path: Path
    what: str


def traces(out: Path, *, original: bool = False, oracle: bool = False) -> list[Trace]:
    """What a purge of the run directory would delete.

    Only megu's own files in the directory are ever named; a checkpoint of the user's, the images and the list of a
    request lie elsewhere, or have other names, and are left alone.

    Args:
        out: The run directory.
        original: Also the original model that `megu train` made.
        oracle: Also the retrained model.
    """
    files = dict(_TRACES)
    if original:
        files["original.safetensors"] = _MODELS["original.safetensors"]
    if oracle:
        files["oracle.safetensors"] = _MODELS["oracle.safetensors"]
    # `megu compare` runs MeGU once more for each seed, in folders of its own; the figures of its methods stay.
    beside = sorted(path for name in files for path in (out / "compare").rglob(name) if within(out, path.parent))
    paths = [*(out / name for name in files), *beside]
    return [Trace(path, files[path.name]) for path in paths if path.is_file()]


def kept(out: Path, going: list[Trace]) -> list[str]:
    """What stays of megu's own files."""
    gone = {trace.path for trace in going}
    return [name for name in KEPT if out / name not in gone and (out / name).is_file()]


def shows_forgotten(out: Path) -> bool:
    """Whether the report in the run directory shows forgotten images."""
    try:
        # The mark stands in the page's head.
        with (out / "report.html").open(encoding="utf-8") as stream:
            return SHOWS_FORGOTTEN in stream.read(4096)
    except FileNotFoundError:
        return False


def delete(going: list[Trace]) -> None:
    """Delete files; the directory is synced, so that they are gone also after a crash.

    Raises:
        ArtifactError: One cannot be deleted.
    """
    for trace in going:
        try:
            trace.path.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactError(f"{trace.path} cannot be deleted: {error.strerror}") from None
    for folder in {trace.path.parent for trace in going}:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
