"""Purge: delete what holds traces of the forgotten data, once the result is accepted.

The run directory is all that it needs: neither the data, which may be deleted by then, nor anything to be drawn.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from megu_cli.errors import ArtifactError
from megu_cli.pipeline.stages import STAGES
from megu_cli.run import files
from megu_cli.run.artifacts import read_meta
from megu_cli.run.log import RunLog
from megu_cli.run.ownership import refuse_foreign

# Stands in a report that shows forgotten images.
SHOWS_FORGOTTEN = '<meta name="megu-shows-forgotten-images" content="yes">'
_PAGE = f"{files.REPORT}.html"


def _traces() -> dict[str, str]:
    """File that holds traces of the forgotten data -> what it holds, in words."""
    return {
        **{file: words for stage in STAGES.values() for file, words in stage.traces.items()},
        files.FILE_DIGESTS: "digests of the image files",
        files.INPUT_DIGESTS: "digests of the data and the request",
        files.REQUESTS: "names of the images to forget",
        **{files.resume_file(name): f"the state of a {name} that was interrupted" for name in STAGES},
    }


def _on_request() -> dict[str, str]:
    """File that is deleted only if an option names it -> what it holds, in words."""
    return {file: words for stage in STAGES.values() for file, words in stage.purged_on_request.items()}


def _known() -> list[str]:
    """All files that a run directory may hold, but for those in folders."""
    return [
        *(files.UNLEARNED + suffix for suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors")),
        *(file for stage in STAGES.values() for file in (stage.file, *stage.weights)),
        *(files.HEAT_MAP, files.LOG, _PAGE, f"{files.REPORT}.md", f"{files.REPORT}.json", files.COMPARISON),
        *(files.FINGERPRINTS, files.RECORD, files.SALT),
        *_traces(),
    ]


@dataclass(frozen=True)
class Trace:
    """A file that is to go."""

    path: Path
    what: str


def check(out: Path) -> None:
    """See that the run is finished: an unfinished one still needs what would be deleted.

    Raises:
        ArtifactError: It is not.
    """
    try:
        made, judged = (read_meta(out / name) for name in (files.FINETUNE, files.EVALUATION))
    except ArtifactError as error:
        raise _unfinished(error.message) from None
    if judged.get("inputs", {}).get(made.get("stage")) != made["content"]:
        raise _unfinished(f"{files.EVALUATION} is not the evaluation of this {files.FINETUNE}")


def _unfinished(why: str) -> ArtifactError:
    return ArtifactError(
        f"nothing was deleted: {why}",
        "Finish the run with `megu run`, and purge once its result is accepted; or purge as it is with --force.",
    )


def traces(out: Path, also: Collection[str] = ()) -> list[Trace]:
    """What a purge of the run directory would delete.

    Only files that megu wrote are ever named, and no link is followed.

    Args:
        out: The run directory.
        also: Files that are deleted on request only, such as ``original.safetensors``: those of `megu train` and of
            `megu compare`.
    """
    named = {**_traces(), **{file: words for file, words in _on_request().items() if file in also}}
    # `megu compare` runs MeGU once more for each seed, in folders of its own; the figures of its methods stay.
    beside = [path for path in _files(out / files.COMPARE_FOLDER) if path.name in named]
    logs: dict[Path, RunLog] = {}
    found = [Trace(path, named[path.name]) for path in [*(out / name for name in named), *beside] if _ours(path, logs)]
    if _ours(out / _PAGE, logs) and _shows_traces(out / _PAGE):
        found.append(
            Trace(out / _PAGE, "pictures of the noises or of forgotten images; `megu report` makes one without")
        )
    return found


def kept(out: Path, going: list[Trace]) -> list[str]:
    """What stays of megu's files in the run directory, relative to it."""
    gone = {trace.path for trace in going}
    known = [out / name for name in _known()]
    for folder in (files.UNLEARNED, files.COMPARE_FOLDER, files.TENSORBOARD):
        known += _files(out / folder)
    return [path.relative_to(out).as_posix() for path in dict.fromkeys(known) if path not in gone and path.is_file()]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, links not followed."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.is_file():
            yield path


def _ours(path: Path, logs: dict[Path, RunLog]) -> bool:
    """True if megu wrote the file; the files of digests have names that are megu's alone."""
    if not path.is_file() or path.is_symlink():
        return False
    log = logs.setdefault(path.parent, RunLog(path.parent))  # one a folder: it says once which lines are damaged
    try:
        refuse_foreign(path.parent, path.name, log.written(path.name))
    except ArtifactError:
        return path.name in (files.FILE_DIGESTS, files.INPUT_DIGESTS)
    return True


def _shows_traces(page: Path) -> bool:
    """True if a report shows noises or forgotten images, or is not whole."""
    text = page.read_text(encoding="utf-8", errors="replace")
    noises = re.search(r'<section[^>]*\bid="noise".*?</section>', text, flags=re.DOTALL)
    return SHOWS_FORGOTTEN in text or "</html>" not in text or bool(noises and "<img" in noises.group())


def may_go(name: str) -> bool:
    """True if a purge deletes the file of this name, at least where it is asked to."""
    return name in _traces() or name in _on_request()


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
