"""Checkpoints of strangers: no pickled code runs, and whatever else is in the file is refused in words or used."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from conftest import write_config
from hypothesis import strategies as st

from .conftest import PHOTOS
from .harness import call, expected_errors, fresh, fuzz
from .material import NASTY, NUMBERS, damaged, junk, texts


class Runs:
    """What a pickle calls when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def _looped(kind: type) -> Any:
    inner: Any = kind()
    if kind is dict:
        inner["self"] = inner
    else:
        inner.append(inner)
    return inner


def odd_tensors() -> list[torch.Tensor]:
    """Tensors of kinds that no classifier's weights are."""
    plain = torch.ones(3, 3)
    return [
        plain.to_sparse(),
        plain.to_sparse_csr(),
        torch.empty(3, 3, device="meta"),
        torch.empty(2**40, device="meta"),
        plain.to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        plain.to(torch.complex64),
        plain.bool(),
        plain.to(torch.int64),
        torch.full((3, 3), float("nan")),
        torch.ones(0),
        torch.ones(()),
        torch.ones(1).expand(10**9),
        plain.t(),
        torch.nn.Parameter(plain),
        torch.ones((1,) * 60),
    ]


KEYS = st.one_of(
    st.sampled_from(("state_dict", "model", "module.", "ema", "optimizer", "state", "param_groups", "epoch")),
    texts(),
    st.sampled_from((0, -1, 2**70, None, True, 1.5, float("nan"), (), ("a", 1), b"x", frozenset({"a", "b"}))),
)


def contents(state: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What may stand in a file, beside or in place of the weights."""
    odd = st.sampled_from(odd_tensors())
    strange = st.sampled_from(
        (_looped(dict), _looped(list), {"a", "b", "c"}, b"\xff", 3 + 4j, torch.Size([1]), torch.int8)
    )
    leaves = st.one_of(odd, strange, junk(), st.sampled_from(NUMBERS), st.just(state))
    trees = st.recursive(
        leaves, lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3), max_leaves=5
    )

    @st.composite
    def edited(draw: st.DrawFn) -> Any:
        new: Any = OrderedDict(state) if draw(st.booleans()) else dict(state)
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(list(state)))
            action = draw(st.sampled_from(("odd", "leaf", "drop", "rename", "add")))
            if action == "odd":
                new[name] = draw(odd)
            elif action == "leaf":
                new[name] = draw(leaves)
            elif action == "add":
                new[draw(KEYS)] = draw(leaves)
            elif name in new:
                value = new.pop(name)
                if action == "rename":
                    new[draw(st.sampled_from((f"module.{name}", name.upper(), f"{name}\x1b[2J", 7)))] = value
        return new if draw(st.booleans()) else {"state_dict": new, draw(KEYS): draw(leaves)}

    return st.one_of(edited(), edited(), trees)


@st.composite
def files(draw: st.DrawFn, state: dict[str, Any], marker: Path) -> bytes:
    """The bytes of a file that calls itself a checkpoint."""
    kind = draw(st.sampled_from(("content", "content", "content", "bytes", "code", "bare pickle", "old format")))
    if kind == "bytes":
        return draw(damaged(_saved(dict(state))))
    if kind == "code":
        import builtins
        import os

        attack = draw(
            st.sampled_from(
                (
                    Runs(os.system, f"touch {marker}"),
                    Runs(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
                    Runs(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
                    Runs(open, str(marker), "w"),
                    Runs(__import__, "antigravity"),
                )
            )
        )
        content = draw(st.sampled_from((attack, {"state_dict": state, "x": attack}, {**state, "x": attack})))
        return _saved(content) if draw(st.booleans()) else pickle.dumps(attack)
    content = draw(contents(state))
    if kind == "bare pickle":
        try:
            return pickle.dumps(content)
        except Exception:  # some odd tensors have no pickle
            return b"\x80"
    return _saved(content, kind == "old format")


def _saved(content: Any, old: bool = False) -> bytes:
    stream = io.BytesIO()
    try:
        torch.save(content, stream, _use_new_zipfile_serialization=not old)
    except Exception:  # torch writes not all that is made up here
        return b"PK"
    return stream.getvalue()


def _model() -> torch.nn.Module:
    from megu_cli.models.sources import build

    torch.manual_seed(0)
    return build("small_cnn", 3, 3)


MODEL = _model()
STATE = {name: value.clone() for name, value in MODEL.state_dict().items()}
SUFFIXES = (".pth", ".pth", ".pt", ".bin", ".safetensors", "")


@fuzz(data=st.data(), suffix=st.sampled_from(SUFFIXES))
def test_reading_a_checkpoint(tmp_path_factory: Any, data: Any, suffix: str) -> None:
    from megu_cli.models.checkpoints import read

    folder = tmp_path_factory.getbasetemp()
    marker, path = folder / "pwned", folder / f"odd{suffix}"
    path.write_bytes(data.draw(files(STATE, marker)))
    with expected_errors():
        found = read(path, MODEL, data.draw(st.sampled_from((None, None, None, "state_dict", *NASTY[:6]))))
        _ = found.described, found.bare
        if found.state.keys() == STATE.keys() and all(found.state[n].shape == STATE[n].shape for n in STATE):
            found.written(STATE)
    assert not marker.exists()


@fuzz(data=st.data(), command=st.sampled_from(("labels", "labels", "run")))
def test_checkpoints(photos: Path, whole: Path, data: Any, command: str) -> None:
    marker = photos / "pwned"
    (photos / "odd.pth").write_bytes(data.draw(files(STATE, marker)))
    run = photos / "mine"
    fresh(run)
    run.mkdir()
    config = {**PHOTOS, "model": {"name": "small_cnn", "checkpoint": "odd.pth", "preflight": False}}
    write_config(photos, **{**config, "forget": {"samples": "delete.csv"}, "out": "mine"})
    for name in ("similarity.json", "transition.safetensors", ".digests.npy"):
        (run / name).write_bytes((whole / name).read_bytes())
    try:
        call(command, "-c", photos / "megu.yaml", user=photos, run=run, writes=True)
    finally:
        fresh(run)
    assert not marker.exists()
