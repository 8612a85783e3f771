"""Checkpoint files as training scripts leave them: found, unlearned, wrapped the same way, and nothing left in them."""

from __future__ import annotations

import argparse
import copy
import datetime

import numpy as np
import pytest
import torch
from conftest import process, write_config
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from megu_cli.errors import CheckpointError
from megu_cli.execution.runtime import seeded
from megu_cli.models import checkpoints, sources, weights


def net(seed: int = 0) -> nn.Module:
    with seeded(seed, "test"):
        return sources.build("small_cnn", 10, 1)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer


def prefixed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPINGS = {
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
    "model": (lambda s: {"model": s}, "model"),
    "model_state_dict": (lambda s: {"model_state_dict": s}, "model_state_dict"),
    "net": (lambda s: {"net": s, "acc": 91.5}, "net"),
    "of no usual name": (lambda s: {"resnet": s}, "resnet"),
    "nested": (lambda s: {"checkpoint": {"weights": s}}, "checkpoint.weights"),
    "DDP": (lambda s: prefixed(s, "module."), "module"),
    "compiled DDP": (lambda s: {"model": prefixed(s, "_orig_mod.module.")}, "model._orig_mod.module"),
    "Lightning": (lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 0.1}}, "state_dict.model"),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_and_go_back_wrapped_the_same_way(tmp_path, wrapping):
    wrap, name = WRAPPINGS[wrapping]
    model, unlearned = net(), net(1)
    torch.save(wrap(model.state_dict()), tmp_path / "a.pth")
    found = checkpoints.read(tmp_path / "a.pth", net())
    assert found.chosen.name == name
    assert not found.bare
    assert found.state.keys() == model.state_dict().keys()
    assert all(torch.equal(found.state[key], value) for key, value in model.state_dict().items())

    (tmp_path / "b.pth").write_bytes(found.written(unlearned.state_dict()))
    assert found.written(unlearned.state_dict()) == (tmp_path / "b.pth").read_bytes()  # the same bytes again
    expected = wrap(unlearned.state_dict())
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    torch.testing.assert_close(written, expected, rtol=0, atol=0)
    assert found.renewed(unlearned.state_dict()).dropped == []


def test_a_bare_state_dict_keeps_torchs_note_on_it(tmp_path):
    torch.save(net().state_dict(), tmp_path / "a.pt")
    found = checkpoints.read(tmp_path / "a.pt", net())
    assert found.bare
    content = found.renewed(net(1).state_dict()).content
    assert type(content) is type(net().state_dict())
    assert content._metadata.keys() == net().state_dict()._metadata.keys()


def trained_file(model: nn.Module) -> dict:
    """What a training script leaves: an average, moments, a random state, a raw copy, settings."""
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    optimizer = stepped(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "model": model.state_dict(),
        "model_ema": {k: v.half() if v.is_floating_point() else v for k, v in average.state_dict().items()},
        "best": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "features": [torch.rand(3), "text", (torch.rand(2), 1)],
        "steps": torch.tensor(900),
        "blob": b"x" * 100,
        "epoch": 7,
        "args": {"lr": 0.1, "data": "images", "sizes": [1, 2]},
    }


def test_nothing_that_was_learned_stays(tmp_path):
    model = net()
    content = trained_file(model)
    torch.save(content, tmp_path / "a.pth")
    found = checkpoints.read(tmp_path / "a.pth", net())
    assert found.chosen.name == "model"
    assert [c.name for c in found.copies] == ["model", "best", "model_ema.module"]

    unlearned = net(1).state_dict()
    renewed = found.renewed(unlearned)
    assert renewed.replaced == ["model", "best", "model_ema.module"]
    assert renewed.dropped == ["optimizer.state: 36 tensors", "rng", "blob", "features.0", "features.2.0"]
    (tmp_path / "b.pth").write_bytes(found.written(unlearned))
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert written.keys() == content.keys() - {"rng", "blob"}
    assert written["features"] == ["text", (1,)]
    assert {key: written[key] for key in ("epoch", "args", "steps", "lr_scheduler")} == {
        key: content[key] for key in ("epoch", "args", "steps", "lr_scheduler")
    }
    for key, value in unlearned.items():
        assert torch.equal(written["model"][key], value)
        assert torch.equal(written["best"][key], value)
        assert torch.equal(written["model_ema"][f"module.{key}"], value.half() if value.is_floating_point() else value)

    # No tensor of the input is left but counters.
    def tensors(content):
        return {v.numpy().tobytes() for _, v in checkpoints._leaves(content) if torch.is_tensor(v) and v.ndim}

    old, new = tensors(content), tensors(written)
    untrained = tensors(net().state_dict()) | tensors(net().half().state_dict())  # such as biases of 0
    assert not (old & new) - untrained
    # And the script goes on with it.
    other = net(2)
    other.load_state_dict(written["model"])
    optimizer = torch.optim.Adam(other.parameters())
    optimizer.load_state_dict(written["optimizer"])
    other(torch.rand(4, 1, 8, 8)).sum().backward()
    optimizer.step()


def test_another_copy_can_be_asked_for(tmp_path):
    content = trained_file(net())
    torch.save(content, tmp_path / "a.pth")
    for key in ("model_ema", "model_ema.module", "module"):
        found = checkpoints.read(tmp_path / "a.pth", net(), key)
        assert torch.equal(found.state["head.bias"], content["model_ema"]["module.head.bias"])
    with pytest.raises(
        CheckpointError, match=r"no weights of this model under 'optimizer'\nThere are: model, best, mo"
    ):
        checkpoints.read(tmp_path / "a.pth", net(), "optimizer")


def test_an_average_in_the_same_mapping(tmp_path):
    state = {**net().state_dict(), **prefixed(net(1).state_dict(), "ema.")}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    found = checkpoints.read(tmp_path / "a.safetensors", net())
    assert found.chosen.name == ""
    assert torch.equal(found.state["head.bias"], net().state_dict()["head.bias"])
    renewed = found.renewed(net(2).state_dict())
    assert renewed.replaced == ["the weights", "ema"]
    assert renewed.content.keys() == state.keys()
    assert torch.equal(renewed.content["ema.head.bias"], net(2).state_dict()["head.bias"])


def pickled(kind: str) -> object:
    state = net().state_dict()
    return {
        "namespace": {"model": state, "args": argparse.Namespace(lr=0.1)},
        "numpy": {"model": state, "best": np.float64(0.9)},
        "module": net(),
        "date": {"model": state, "when": datetime.date(2020, 1, 1)},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "needed", "how"),
    [
        ("namespace", "argparse.Namespace", "vars(v) if type(v).__name__ == 'Namespace'"),
        ("numpy", "numpy", "v.tolist() if type(v).__module__ == 'numpy'"),
        ("module", "torch.nn.modules.activation.ReLU", ".state_dict(), 'weights.pth')"),
        ("date", "datetime.date", "c.get('state_dict', c)"),
    ],
)
def test_what_would_run_code_is_refused_with_the_way_to_convert_it(tmp_path, monkeypatch, kind, needed, how):
    torch.save(pickled(kind), tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as refusal:
        checkpoints.read(tmp_path / "a.pth", net())
    assert "it was not loaded" in refusal.value.message
    assert needed in refusal.value.message
    assert how in refusal.value.hint
    # The way to convert it works.
    script = "\n".join(line.strip() for line in refusal.value.hint.splitlines()[1:])
    monkeypatch.chdir(tmp_path)
    if kind == "date":
        script = script.replace("'state_dict'", "'model'")
    exec(script, {})
    file = "weights.pth" if kind == "module" else "converted.pth"
    assert checkpoints.read(tmp_path / file, net()).state.keys() == net().state_dict().keys()


class Tied(nn.Module):
    """Its head is its embedding, and has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
        self.norm = nn.LayerNorm(10)
        self.embed = nn.Linear(10, 10, bias=False)
        self.head = nn.Linear(10, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(self.norm(self.body(x))))


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    assert ["embed.weight", "head.weight"] in weights.names_of_tensors(model)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    save_model(model, str(tmp_path / "a.safetensors"))  # it keeps one of the two names
    assert len(load_file(tmp_path / "a.safetensors")) == 4
    for name, keys in (("a.pth", 5), ("a.safetensors", 4)):
        found = checkpoints.read(tmp_path / name, Tied())
        loaded = weights.load_state(Tied(), found.state, name)
        assert loaded.head.weight is loaded.embed.weight
        assert torch.equal(loaded.head.weight, model.head.weight)
        written = found.renewed(other.state_dict()).content
        written = written.get("model", written)
        assert len(written) == keys == len(weights.like(other.state_dict(), found.state))
        if keys == 5:
            assert written["head.weight"].data_ptr() == written["embed.weight"].data_ptr()
    untied = {**model.state_dict(), "head.weight": torch.zeros(10, 10)}
    with pytest.raises(CheckpointError, match="are one tensor in the model"):
        weights.load_state(Tied(), untied, "x")


def test_a_wrapped_checkpoint_through_the_command_line(megu, finished):
    """A .pth as DDP training leaves it; one command; what is written loads where the input did."""
    folder = finished.parent
    state = load_file(folder / "run" / "original.safetensors")
    average = {key: value + 0.001 if value.is_floating_point() else value for key, value in state.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"state_dict": prefixed(state, "module."), "ema": average, "epoch": 5, "optimizer": optimizer}
    torch.save(content, folder / "mine.pth")
    out = folder / "out"
    given = (
        "-c",
        finished,
        "-o",
        out,
        "--set",
        f"model.checkpoint={folder / 'mine.pth'}",
        "--set",
        "eval.oracle=false",
    )
    answer = megu("run", *given)
    assert answer.code == 0, answer.err
    assert "finetune: model.pth is the unlearned checkpoint, wrapped as the input is" in answer.err
    assert "finetune: unlearned from state_dict.module; replaced as well: ema" in answer.err
    assert "finetune: left out, since it was learned: optimizer.state.0.momentum_buffer" in answer.err
    written = torch.load(out / "model.pth", weights_only=True)
    assert written.keys() == content.keys()
    assert written["optimizer"] == {"state": {}, "param_groups": [{"lr": 0.1}]}
    plain = load_file(out / "model.safetensors")
    assert plain.keys() == state.keys()
    for key, value in plain.items():
        assert torch.equal(written["state_dict"][f"module.{key}"], value)
        assert torch.equal(written["ema"][key], value)
    assert not torch.equal(plain["head.weight"], state["head.weight"])
    # The same command computes nothing; a file that was lost is made again.
    assert "running" not in megu("run", *given).err
    before = (out / "model.pth").read_bytes()
    (out / "model.pth").unlink()
    answer = megu("run", *given)
    assert "finetune: running" in answer.err
    assert (out / "model.pth").read_bytes() == before
    # So it is where what stands beside the weights changed.
    torch.save({**content, "epoch": 6}, folder / "mine.pth")
    assert (
        "finetune: running (stale: changed: what stands beside the weights in the checkpoint)"
        in megu("run", *given).err
    )
    assert torch.load(out / "model.pth", weights_only=True)["epoch"] == 6


def test_a_safetensors_file_with_prefixes(megu, tmp_path, finished):
    folder = finished.parent
    state = load_file(folder / "run" / "original.safetensors")
    save_file({**prefixed(state, "module."), "aux": torch.rand(2)}, folder / "mine.safetensors")
    out = folder / "out"
    mine = folder / "mine.safetensors"
    answer = megu("run", "-c", finished, "-o", out, "--set", f"model.checkpoint={mine}")
    assert answer.code == 0, answer.err
    assert "left out, since it was learned: aux" in answer.err
    assert load_file(out / "model.safetensors").keys() == prefixed(state, "module.").keys()


def test_a_config_for_a_checkpoint_of_another_shape(megu, tmp_path):
    torch.save({"model": {"x.weight": torch.rand(2, 2)}}, tmp_path / "a.pth")
    answer = megu("run", "-c", write_config(tmp_path, model={"checkpoint": "a.pth"}))
    assert answer.code == 2
    assert "a.pth does not fit the model" in answer.err
    assert "unexpected: x.weight" in answer.err


def _itself() -> dict:
    content: dict = {"model": net().state_dict()}
    content["again"] = [content]
    return content


def _twice(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


def _weights(change) -> dict:
    state = net().state_dict()
    name = next(name for name, value in state.items() if value.ndim == 2)
    state[name] = change(state[name])
    return {"model": state}


ODD = {
    "contains itself": (_itself, "contains itself, or is nested too deeply"),
    "shares without end": (lambda: {"model": net().state_dict(), "x": _twice(50)}, "contains itself, or is nested"),
    "a key of bytes": (lambda: {"model": net().state_dict(), b"x": 1}, "a key that is no text or number"),
    "NaN for a key": (lambda: {"model": net().state_dict(), float("nan"): 1}, "a key that is no text or number"),
    "a long number": (lambda: {"model": net().state_dict(), "n": [10**5000]}, "too many digits at n.0|holds more than"),
    "a long number for a key": (lambda: {"model": net().state_dict(), 10**5000: 1}, "a key that is no|holds more than"),
    "sparse": (lambda: _weights(torch.Tensor.to_sparse), "is sparse"),
    "CSR": (lambda: _weights(torch.Tensor.to_sparse_csr), "is sparse"),
    "meta": (lambda: _weights(lambda value: value.to("meta")), "is a meta tensor"),
    "float8": (lambda: _weights(lambda value: value.to(torch.float8_e4m3fn)), "has the dtype torch.float8_e4m3fn"),
    "quantised": (
        lambda: _weights(lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)),
        "is quantised",
    ),
    "nested": (lambda: {"model": net().state_dict(), "n": torch.nested.nested_tensor([torch.zeros(2)])}, "nested|code"),
}


@pytest.mark.parametrize(("make", "message"), ODD.values(), ids=ODD)
def test_what_cannot_be_used_in_a_file_is_named(tmp_path, megu, make, message):
    try:
        torch.save(make(), tmp_path / "a.pth")
    except ValueError:
        pytest.skip("this Python writes no such number")
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.read(tmp_path / "a.pth", net())
    assert str(tmp_path / "a.pth") in caught.value.message
    assert len(caught.value.message) < 500
    file = write_config(tmp_path, model={"name": "small_cnn", "checkpoint": str(tmp_path / "a.pth")})
    answer = megu("run", "-c", file)
    assert answer.code == 2, answer.err
    assert "a.pth" in answer.err


def test_a_set_in_a_file_follows_no_hash_seed(tmp_path):
    state = net().state_dict()
    torch.save(
        {"model": state, "tags": {"ant", "bee", "cat", "dog", "eel"}, "empty": set(), "one": {3}}, tmp_path / "a"
    )
    code = (
        "import hashlib, sys, torch\n"
        "from megu_cli.models import checkpoints, sources\n"
        "from megu_cli.run import artifacts\n"
        "found = checkpoints.read(__import__('pathlib').Path(sys.argv[1]), sources.build('small_cnn', 10, 1))\n"
        "written = found.written(found.state)\n"
        "print(artifacts.digest(found.described), hashlib.sha256(written).hexdigest())\n"
    )
    told = {process("-c", code, tmp_path / "a", environment={"PYTHONHASHSEED": seed}).stdout for seed in "12"}
    assert len(told) == 1
    assert len(told.pop().split()) == 2
    found = checkpoints.read(tmp_path / "a", net())
    (tmp_path / "b").write_bytes(found.written(state))
    again = torch.load(tmp_path / "b", weights_only=True)
    assert (again["tags"], type(again["tags"])) == ({"ant", "bee", "cat", "dog", "eel"}, set)
    shown = {tuple(place): what for place, _, what in found.described["layout"]}
    assert (shown["empty",], shown["one",]) == ("set()", "{3}")  # as before, so that no key changes
