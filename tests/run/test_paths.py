"""No path leads out of the run directory."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from megu_cli import baselines
from megu_cli.config import load_config
from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.pipeline import purge
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.run import artifacts, writing
from megu_cli.run.artifacts import Artifact


def test_an_artifact_that_names_a_file_outside_is_corrupt(finished):
    out = finished.parent / "run"
    outside = finished.parent / "outside.safetensors"
    (out / "model.safetensors").rename(outside)
    read = artifacts.read(out / "finetune.json")
    meta = {k: v for k, v in read.meta.items() if k not in ("content", "checksum")}
    names = {"../outside.safetensors": read.meta["weights"]["model.safetensors"]}
    artifacts.write(out / "finetune.json", artifacts.seal(Artifact(read.body), {**meta, "weights": names}))
    state = Pipeline(RunContext.open(load_config(finished))).state("finetune")
    assert (state.status, state.reason) == (
        "corrupt",
        "its meta names ../outside.safetensors, a file outside the run directory",
    )


def test_megu_writes_through_no_link(tmp_path):
    target = tmp_path / "precious.json"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.json").symlink_to(target)
    with pytest.raises(ArtifactError, match="symbolic link"):
        artifacts.write(tmp_path / "run" / "eval.json", artifacts.seal(Artifact({}), {}))
    assert target.read_text() == "mine"
    assert (tmp_path / "run" / "eval.json").is_symlink()


@pytest.mark.parametrize("place", ["compare", "compare/0", "else"])
def test_neither_the_sweep_nor_purge_follows_links_out(tmp_path, place):
    outside = tmp_path / "outside"
    outside.mkdir()
    mine = [outside / "labels.safetensors", outside / f"{writing._TEMPORARY}1-x"]
    for path in mine:
        path.write_text("mine")
    run = tmp_path / "run"
    (run / place).parent.mkdir(parents=True)
    (run / place).symlink_to(outside)
    with writing.locked(run):
        purge.delete(purge.traces(run))
    assert all(path.exists() for path in mine)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_methods_of_packages_have_plain_names(monkeypatch, name):
    point = EntryPoint(name, "package:method", baselines.GROUP)
    monkeypatch.setattr(baselines, "entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match="is no plain name"):
        baselines.methods()
