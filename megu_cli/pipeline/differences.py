"""What differs between two run directories: settings, inputs and figures. Only the directories are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megu_cli.errors import ArtifactError, ForeignFileError
from megu_cli.pipeline.freshness import flat
from megu_cli.run import files
from megu_cli.run.artifacts import STAGE_KEYS, read_body, read_meta

# Sections of eval.json without figures of a model: times differ between equal runs, and the rest is for drawing.
_NO_FIGURES = ("request", "aggregates", "time", "retrained_by")


@dataclass
class Run:
    """What the artifacts of a run directory were made from, and what was measured.

    Attributes:
        versions: Version of megu, and of each stage.
        settings: Dotted key -> value.
        inputs: Name -> digest, of the inputs that no stage makes.
        request: What was to be forgotten, as eval.json has it.
        figures: Dotted name -> number.
    """

    versions: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read the artifacts of a run directory.

    Raises:
        ArtifactError: There are none, or one is damaged.
    """
    run, metas = Run(), dict(_metas(folder))
    if not metas:
        raise ArtifactError(f"{folder} holds no artifact of megu", "Name a run directory, such as megu-run.")
    if last := metas.get(files.EVALUATION) or metas.get(files.FINETUNE):
        # What another method has left there says nothing of this result.
        metas = {name: meta for name, meta in metas.items() if meta["stage"] in {*last["lineage"], last["stage"]}}
    # A stage's own artifact comes after what later stages record of it.
    stages = [item for meta in metas.values() for item in meta["lineage"].items()]
    stages += [(str(meta["stage"]), meta) for meta in metas.values()]
    names = {name for name, _ in stages}
    for name, meta in stages:
        run.versions[f"stage {name}"] = meta["version"]
        run.settings |= flat(meta["settings"])
        run.inputs |= {key: value for key, value in meta["inputs"].items() if key not in names}
        if "train" in meta["inputs"]:  # the original model: the user's checkpoint, or the artifact of `train`
            run.inputs["checkpoint"] = meta["inputs"]["train"]
    run.versions["megu"] = metas[max(metas)].get("megu")
    if files.EVALUATION in metas:
        body = read_body(folder / files.EVALUATION)
        run.request = flat(body["request"])
        sections = sorted(set(body) - set(_NO_FIGURES), key=lambda name: (name == "per_class", list(body).index(name)))
        run.figures = flat({name: body[name] for name in sections})
    return run


def _metas(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File name -> meta of each stage's artifact."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            meta = read_meta(file)
        except ForeignFileError:
            continue
        if "stage" in meta and all(key in meta for key in STAGE_KEYS):
            yield file.name, meta


def differences(first: Run, second: Run) -> dict[str, list[dict[str, Any]]]:
    """Section -> what differs in it, as ``{"name", "a", "b"}``; a value that a run does not have is ``None``."""
    result = {}
    for section in Run.__dataclass_fields__:
        a, b = getattr(first, section), getattr(second, section)
        result[section] = [
            {"name": name, "a": a.get(name), "b": b.get(name)}
            for name in dict.fromkeys([*a, *b])
            if a.get(name) != b.get(name)
        ]
    return result
