"""Artifacts are whole or absent, verified when read, and written by one process at a time."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from megu_cli.config import DataConfig, ModelConfig
from megu_cli.errors import ArtifactError, ForeignFileError
from megu_cli.models.marks import MARK, MARK_IN_CONFIG
from megu_cli.models.user_model import UserModel
from megu_cli.run import artifacts, writing
from megu_cli.run.artifacts import Artifact
from megu_cli.run.ownership import refuse_foreign

META = {"stage": "labels", "fingerprint": "f", "lineage": {}, "seed": 0}


def sealed(**tensors: torch.Tensor) -> Artifact:
    return artifacts.seal(Artifact({"b": 1, "a": ["ü"]}, tensors), META)


@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
def test_round_trip_and_same_bytes(tmp_path, name):
    tensors = {} if name.endswith("json") else {"t": torch.arange(6).view(2, 3), "u": torch.rand(3)}
    for file in (name, f"again-{name}"):
        artifacts.write(tmp_path / file, sealed(**tensors))
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    back = artifacts.read(tmp_path / name)
    assert back.body == {"b": 1, "a": ["ü"]}
    assert all(torch.equal(back.tensors[k], v) for k, v in tensors.items())
    assert artifacts.read_meta(tmp_path / name) == back.meta
    assert back.content == sealed(**tensors).content


def test_an_artifact_without_tensors_is_whole_too(tmp_path):
    artifacts.write(tmp_path / "noise.safetensors", sealed())
    assert artifacts.read(tmp_path / "noise.safetensors").body == {"b": 1, "a": ["ü"]}


def test_the_header_carries_one_key_of_canonical_json(tmp_path):
    artifacts.write(tmp_path / "x.safetensors", sealed(t=torch.zeros(1)))
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["megu"]
    assert metadata["megu"] == artifacts.canonical(json.loads(metadata["megu"])).decode()


@pytest.mark.parametrize("position", [0, 9, 200, -1])
def test_any_flipped_byte_is_noticed(tmp_path, position):
    path = tmp_path / "x.safetensors"
    artifacts.write(path, sealed(t=torch.rand(50)))
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError):
        artifacts.read_meta(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
def test_a_truncated_file_is_noticed(tmp_path, name, keep):
    path = tmp_path / name
    artifacts.write(path, sealed(**({} if name == "x.json" else {"t": torch.rand(50)})))
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else -2])
    with pytest.raises(ArtifactError):
        artifacts.read_meta(path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [('"b": 1', '"b": 2', "does not match its digest"), ('"format": 1', '"format": 2', "has format 2")],
)
def test_an_edited_body_and_a_newer_format_are_refused(tmp_path, before, after, message):
    path = tmp_path / "x.json"
    artifacts.write(path, sealed())
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ArtifactError, match=message):
        artifacts.read_meta(path)


def test_a_digest_of_tensors_depends_on_content_alone(tmp_path):
    a, b = torch.rand(2, 3), torch.arange(4)
    save_file({"a": a, "b": b}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file({"b": b, "a": a}, tmp_path / "2.safetensors")
    digest = artifacts.tensor_digest(tmp_path / "1.safetensors")
    assert artifacts.tensor_digest(tmp_path / "2.safetensors") == digest == artifacts.state_digest({"b": b, "a": a})
    changed = [{"a": a + 1, "b": b}, {"a": a.view(3, 2), "b": b}, {"a": a, "b": b.int()}, {"a": a, "c": b}]
    assert len({artifacts.state_digest(state) for state in changed} | {digest}) == 5


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    artifacts.write(path, sealed())
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ArtifactError, match=r"no space left while writing .*x\.json; nothing was lost"):
        artifacts.write(path, artifacts.seal(Artifact({"other": 1}), META))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_lock_sweeps_what_a_killed_writer_left(tmp_path):
    (tmp_path / ".megu-tmp-1-labels.safetensors").write_bytes(b"half")
    (tmp_path / ".megu-tmp-link").symlink_to(tmp_path / "compare")
    folder = writing.temporary_folder(tmp_path / "compare")
    folder.mkdir(parents=True)
    (folder / "task.pkl").write_bytes(b"half")
    with writing.locked(tmp_path):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "compare"}
        assert not folder.exists()
        with pytest.raises(ArtifactError, match="another megu process"), writing.locked(tmp_path):
            pass


def test_the_lock_sweeps_only_its_own_run_directory(tmp_path):
    own = [tmp_path / folder / ".megu-tmp-1-x" for folder in ("model", "compare/0/megu")]
    other = [tmp_path / folder / ".megu-tmp-1-x" for folder in ("nested", "nested/model", "compare/live")]
    for path in own + other:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / "compare" / "live" / ".lock").touch()
    with writing.locked(tmp_path):
        assert not any(path.exists() for path in own)
        assert all(path.exists() for path in other)


def test_the_lock_file_goes_with_the_lock_and_so_does_a_directory_made_for_nothing(tmp_path):
    with writing.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with writing.locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_file_that_its_holder_deletes_is_not_locked_by_who_opened_it_before(tmp_path, monkeypatch):
    import filelock

    acquire = filelock.FileLock.acquire
    opened = []

    def slow(self, *args, **options):
        proxy = acquire(self, *args, **options)
        if not opened:  # what the holder before does between our opening of the file and our locking it
            opened.append(self)
            (tmp_path / ".lock").unlink()
        return proxy

    monkeypatch.setattr(filelock.FileLock, "acquire", slow)
    with writing.locked(tmp_path):
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
def test_the_mode_of_every_file_follows_the_umask(tmp_path, name):
    before = os.umask(0o027)
    try:
        artifacts.write(tmp_path / name, sealed(**({} if name == "x.json" else {"t": torch.zeros(1)})))
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_tied_weights_are_written_one_by_one(tmp_path):
    shared = torch.rand(4)
    artifacts.save_tensors(tmp_path / "x.safetensors", {"a": shared, "b": shared, "c": shared.view(2, 2).t()}, {})
    assert artifacts.tensor_digest(tmp_path / "x.safetensors") == artifacts.state_digest(
        {"a": shared.clone(), "b": shared.clone(), "c": shared.view(2, 2).t().contiguous()}
    )


def test_what_fails_while_a_directory_is_locked_is_not_told_as_its_fault(tmp_path):
    with pytest.raises(FileNotFoundError), writing.locked(tmp_path):
        (tmp_path / "none" / "file").read_text()
    with writing.locked(tmp_path):  # and the lock is free again
        pass


def _with_header(change, tmp_path):
    """A safetensors artifact with another header over the same data."""
    path = tmp_path / "x.safetensors"
    artifacts.write(path, sealed(t=torch.rand(50), u=torch.rand(2, 3)))
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    raw = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    return path


HEADERS = {
    "no shape": lambda h: h["t"].pop("shape") and None,
    "no dtype": lambda h: h["t"].pop("dtype") and None,
    "unknown dtype": lambda h: h["t"].update(dtype="F33"),
    "list for dtype": lambda h: h["t"].update(dtype=["F32"]),
    "odd offsets": lambda h: h["t"].update(data_offsets=[1, 201]),
    "negative": lambda h: h["t"].update(data_offsets=[-8, 192]),
    "overlapping": lambda h: h["u"].update(data_offsets=[176, 200]),
    "three offsets": lambda h: h["t"].update(data_offsets=[0, 100, 200]),
    "fractions": lambda h: h["t"].update(data_offsets=[0.0, 200.0]),
    "negative shape": lambda h: h["t"].update(shape=[-5, -10]),
    "another shape": lambda h: h["t"].update(shape=[51]),
    "a number for a tensor": lambda h: h.update(t=3),
    "null metadata": lambda h: h.update(__metadata__=None),
    "list metadata": lambda h: h.update(__metadata__=["megu"]),
    "NaN": lambda h: h["t"].update(shape=[float("nan")]),
    "a list": lambda h: "[]",
    "deep": lambda h: "[" * 50_000 + "]" * 50_000,
    "deep objects": lambda h: '{"a":' * 50_000 + "1" + "}" * 50_000,
    "deep meta": lambda h: h["__metadata__"].update(megu='{"body":{},"meta":' + "[" * 900 + "]" * 900 + "}"),
    "endless meta": lambda h: h["__metadata__"].update(megu='{"body":{},"meta":{"format":1,"x":1e999}}'),
    "half a character": lambda h: h["__metadata__"].update(megu='{"body":{},"meta":{"format":1,"x":"\\ud800"}}'),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_still_parses_and_is_wrong_is_damage(tmp_path, change):
    path = _with_header(change, tmp_path)
    with pytest.raises(ArtifactError):
        artifacts.read(path)
    with pytest.raises(ArtifactError):
        artifacts.tensor_digest(path) and artifacts.read_meta(path)
    artifacts.is_ours(path)


def test_any_flipped_bit_is_damage_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    artifacts.write(path, sealed(t=torch.rand(5), u=torch.rand(2, 3)))
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 1500):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        with pytest.raises(ArtifactError):
            artifacts.read(path)


@pytest.mark.parametrize(
    "meta",
    [
        ["a"],
        "text",
        {"format": 1, "inputs": ["x"]},
        {"format": 1, "inputs": {"x": 3}},
        {"format": 1, "lineage": {"labels": {"version": 1}}},
        {"format": 1, "files": {"a\0b": "x"}},
        {"format": 1, "weights": "all"},
    ],
    ids=str,
)
def test_a_meta_of_another_shape_is_damage(tmp_path, meta):
    if isinstance(meta, dict):  # sealed, as by someone who means harm
        body = {"a": 1}
        meta = {**meta, "content": artifacts.digest([body])}
        meta["checksum"] = artifacts.digest(meta)
    (tmp_path / "x.json").write_text(json.dumps({"a": 1, "meta": meta}))
    with pytest.raises(ArtifactError, match="damaged"):
        artifacts.read_meta(tmp_path / "x.json")


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    (tmp_path / "y.json").symlink_to("/dev/zero")
    for name in ("x.json", "y.json"):
        with pytest.raises(ArtifactError, match="no regular file"):
            artifacts.read(tmp_path / name)
        with pytest.raises(ArtifactError, match="no regular file"):
            artifacts.file_digest(tmp_path / name)


@pytest.mark.parametrize("kind", ["weights", "files"])
@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "../outside", "zero", "a-directory"])
def test_products_are_regular_files_inside_the_run_directory(tmp_path, kind, name):
    folder = tmp_path / "run"
    (folder / "a-directory").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"x")
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    with pytest.raises((ArtifactError, OSError)):
        artifacts.check_products(folder, {kind: {name: "0" * 64}})


def test_a_product_of_another_size_is_not_read(tmp_path):
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ArtifactError, match="does not have its size"):
        artifacts.check_products(tmp_path, {"files": {"big": "0" * 64}, "sizes": {"big": 5}})


def test_tensors_on_a_full_disk(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"no space left while writing .*; nothing was lost"):
            artifacts.write(tmp_path / "x.safetensors", sealed(t=torch.rand(1 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_unlearned_model_that_was_moved_is_no_artifact_of_a_stage(tmp_path):
    path = tmp_path / "original.safetensors"
    artifacts.save_tensors(path, {"a": torch.zeros(2)}, {MARK: '{"megu": "1"}', "format": "pt"})
    config = tmp_path / "eval.json"
    config.write_text(json.dumps({MARK_IN_CONFIG: {"forgotten": []}, "model_type": "vit"}, indent=2))
    assert not artifacts.is_ours(path)
    for file in (path, config):
        with pytest.raises(ForeignFileError):
            refuse_foreign(tmp_path, file.name)
    model = ModelConfig(name="resnet18", checkpoint=path)
    assert UserModel(model, DataConfig(name="fashion_mnist")).foreign


def test_the_last_of_several_leaves_a_temporary_folder_that_others_may_need(tmp_path):
    folder = writing.temporary_folder(tmp_path / "compare")
    folder.mkdir(parents=True)
    (folder / "2_submitted.pkl").touch()  # of a task of a cluster, which has not begun
    with writing.locked(tmp_path, together=True):
        pass
    assert (folder / "2_submitted.pkl").exists()
    with writing.locked(tmp_path):
        assert not folder.exists()


def test_several_may_write_together_and_the_last_one_tidies_up(tmp_path):
    run = tmp_path / "run"
    with writing.locked(run, together=True):
        with writing.locked(run, together=True):
            (run / ".megu-tmp-1-x").touch()
            with pytest.raises(ArtifactError, match="another megu process"), writing.locked(run):
                pass
        assert sorted(path.name for path in run.iterdir()) == [".lock", ".megu-tmp-1-x"]
    assert not run.exists()
    with writing.locked(run):
        with pytest.raises(ArtifactError, match="another megu process"), writing.locked(run, together=True):
            pass
        assert (run / ".lock").exists()
