"""The Python interface, against the command line and by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import megu_cli
from megu_cli import unlearn
from megu_cli.config import FinetuneConfig, load_config
from megu_cli.errors import ConfigError, DataError
from megu_cli.pipeline.context import RunContext
from megu_cli.run.artifacts import state_digest

DOCS = Path(__file__).parents[2] / "docs"
SHIPPED = Path(megu_cli.__file__).parent / "mllm" / "ratings" / "digits.json"
FINETUNE = {"epochs": 1, "retain_fraction": 1.0, "batch": 12, "forget_batch": 6}


PROXY = {"networks": 1, "passes": 2}


def short(labels=None, **sections):
    """Settings that take no time, with sections laid over them."""
    quick = {"finetune": FINETUNE, "noise": {"steps": 3}, "labels": {"proxy": PROXY, **(labels or {})}}
    return {"settings": {**quick, **sections}}


SHORT = short()


def same_as_run(megu, file: Path, parts: tuple[str, str, str], **more):
    """`unlearn` on what a run's config says, and that run's artifacts beside it; ``more`` are held-out positions."""
    work = RunContext.open(load_config(file))
    config, train, held_out = work.config, work.inputs.data.train, work.inputs.data.held_out

    def samples(index, split=train):
        return next(split.batches([index])), split.labels[index]

    result = unlearn(
        work.original(), retain=samples(work.inputs.request.retain), forget=samples(work.inputs.request.forget),
        similarity=SHIPPED, seed=config.seed,
        settings={name: getattr(config, name) for name in ("transition", "labels", "noise", "finetune")},
        **{name: samples(index, held_out) for name, index in more.items()},
    )  # fmt: skip
    made = [load_file(work.directory.out / name) for name in parts]
    return result, made


def test_it_gives_the_tensors_that_the_command_line_writes(megu, finished):
    work = RunContext.open(load_config(finished))
    names = ("transition.safetensors", "labels.safetensors", "noise.safetensors", "model.safetensors")
    result, (matrix, labels, noise, model) = same_as_run(
        megu, finished, names, validation=work.inputs.request.validation
    )
    assert torch.equal(result.transition, matrix["transition"])
    assert torch.equal(result.labels.perturbing, labels["perturbing"])
    assert set(result.noise) == set(noise) == {"negative", "negative_class"}
    assert all(torch.equal(value, noise[name]) for name, value in result.noise.items())
    assert state_digest(dict(result.model.state_dict())) == state_digest(model)
    body = megu_cli_body(work.directory.out / "finetune.json")
    assert (result.history.loss, result.history.validation) == (body["loss"], body["validation_acc"])


def megu_cli_body(path: Path) -> dict:
    from megu_cli.run.artifacts import read_body

    return read_body(path)


def test_single_images_as_well(megu, tmp_path):
    file = write_config(tmp_path, forget={"random": {"count": 30}}, noise={"use": "both"}, labels={"mode": "soft"})
    assert megu("run", "-c", file).code == 0
    work = RunContext.open(load_config(file))
    names = ("labels.safetensors", "noise.safetensors", "model.safetensors")
    held_out = torch.arange(len(work.inputs.data.held_out))
    result, (labels, noise, model) = same_as_run(megu, file, names, validation=held_out)
    assert result.labels.mode == "soft"
    assert torch.equal(result.labels.target, labels["target"])
    assert all(torch.equal(value, noise[name]) for name, value in result.noise.items())
    assert state_digest(dict(result.model.state_dict())) == state_digest(model)


@pytest.mark.slow
def test_the_documented_example_prints_what_it_says(capsys):
    text = (DOCS / "api.md").read_text()
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/api.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    # Labels may differ by an image or two between versions of torch; the accuracies are told to two places.
    for line, documented in zip(lines[:2], printed.splitlines()[:2], strict=True):
        assert [float(x) for x in re.findall(r"\d\.\d+", line)] == pytest.approx(
            [float(x) for x in re.findall(r"\d\.\d+", documented)], abs=0.03
        )
    assert lines[2].startswith("their labels now: [")


@pytest.fixture
def samples(task):
    def of(index):
        return next(task.split.batches([index])), task.split.labels[index]

    return {"retain": of(task.retain), "forget": of(task.forget)}


def test_nothing_is_drawn_from_the_stream_that_dropout_and_the_caller_draw_from(trained, samples):
    before = torch.get_rng_state()
    unlearn(trained, **samples, **SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_datasets_and_tensors_give_the_same(trained, samples):
    trained.zero_grad()
    before = state_digest(trained.state_dict())
    tensors = unlearn(trained, **samples, **SHORT)
    datasets = unlearn(trained, **{name: TensorDataset(*part) for name, part in samples.items()}, **SHORT)
    first, second = (state_digest(dict(r.model.state_dict())) for r in (tensors, datasets))
    assert first == second != before
    # The user's model is as it was, and so are the flags of the copy.
    assert state_digest(trained.state_dict()) == before
    assert all(p.grad is None for p in trained.parameters())
    assert not tensors.model.training
    other = unlearn(trained, **samples, **short(finetune=FinetuneConfig(**FINETUNE, lr=0.03)))
    assert state_digest(dict(other.model.state_dict())) != first
    assert state_digest(dict(unlearn(trained, **samples, **SHORT, seed=1).model.state_dict())) != first


def test_frozen_parameters_learn_too_and_stay_frozen(trained, samples):
    for parameter in trained[0].parameters():
        parameter.requires_grad_(False)
    result = unlearn(trained, **samples, **SHORT)
    assert not result.model[0].weight.requires_grad
    assert result.model[3:] is not None
    assert not torch.equal(result.model[0].weight, trained[0].weight)


def test_every_form_of_similarity(trained, samples, tmp_path):
    table = torch.tensor([[float("nan"), 9.0, 1.0], [0, 0, 0], [0, 0, 0]])
    (tmp_path / "r.json").write_text(
        '{"classes": ["a", "b", "c"], "scores": {"a": {"b": 9, "c": 1}}, "rater": "this test"}'
    )
    forms = [
        table,
        table.numpy(),
        table.tolist(),
        {"a": {"b": 9, "c": 1}},
        tmp_path / "r.json",
        str(tmp_path / "r.json"),
    ]
    matrices = [
        unlearn(trained, **samples, classes=["a", "b", "c"], similarity=form, **SHORT).transition for form in forms
    ]
    expected = torch.tensor([0.0, *torch.tensor([9 / 3, 1 / 3]).double().softmax(0)]).double()
    assert all(torch.allclose(matrix[0], expected) for matrix in matrices)
    # Without ratings, from the model: here from the forgotten images alone, since nothing is held out.
    with torch.no_grad():
        seen = trained(samples["forget"][0]).double().softmax(1).sum(0) + 1 / 3
    measured = short(transition={"from": "confusions", "images": 100})
    (row,) = unlearn(trained, **samples, **measured).transition
    assert row.tolist() == pytest.approx([0, *(seen[1:] / seen[1:].sum()).tolist()], abs=1e-6)
    with pytest.raises(ConfigError, match=r"transition\.from: confusions takes none"):
        unlearn(trained, **samples, similarity=table, **measured)
    # Without any: every class is as near as any other, and labels are what the model predicts.
    result = unlearn(trained, **samples, **short(labels={"source": "transition+prediction"}))
    assert result.transition.tolist() == [[0, 0.5, 0.5]]
    with torch.no_grad():
        logits = trained(samples["forget"][0])
    assert torch.equal(result.labels.perturbing, 1 + logits[:, 1:].argmax(1))


def test_which_classes_are_forgotten(trained, task, samples):
    assert unlearn(trained, **samples, **SHORT).labels.mode == "proxy"
    x, y = samples["retain"]
    some = {"retain": (x[6:], y[6:]), "forget": (x[:6], y[:6])}
    held_out = (next(task.validation.batches([torch.arange(len(task.validation))])), task.validation.labels)
    result = unlearn(trained, **some, validation=held_out, **SHORT)
    assert result.labels.mode == "proxy"
    assert set(result.labels.keep) == {"1", "2"}
    with pytest.raises(ConfigError, match="held-out"):
        unlearn(trained, **some, **SHORT)
    unlearn(trained, **some, **short(labels={"keep": 0.5}))
    with pytest.raises(ConfigError, match="retain holds samples of 1"):
        unlearn(trained, **some, forgotten=[1], **SHORT)
    assert unlearn(trained, **samples, forgotten=["0"], **SHORT).labels.mode == "proxy"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"settings": {"finetune": {"epoch": 1}}}, ConfigError, "finetune.epoch: unknown key; did you mean epochs"),
        ({"settings": {"noise": {"steps": 0, "lr": -1}}}, ConfigError, "noise.steps.*noise.lr"),
        ({"settings": {"model": {}}}, ConfigError, "settings: unknown section model"),
        ({"classes": ["a", "b"]}, ConfigError, "2 names, and the model predicts 3"),
        ({"classes": ["a", "b", "a"]}, ConfigError, "twice"),
        ({"forgotten": ["x"]}, ConfigError, "no class 'x'"),
        ({"similarity": {"0": {"1": 3}}}, DataError, "rating of '2' for '0' is None"),
        ({"similarity": {"0": {"1": 3, "2": 11}}}, DataError, "is 11"),
        ({"similarity": [[1, 2], [3, 4]]}, DataError, r"it is \(2, 2\)"),
        ({"similarity": "nowhere.json"}, DataError, "nowhere.json"),
        ({"retain": (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.ones(3))}, DataError, "uint8"),
        ({"retain": (torch.zeros(3, 16), torch.ones(3))}, DataError, r"floats \(C, H, W\)|float32 \(16,\)"),
        ({"retain": (torch.zeros(3, 1, 4, 4), torch.full((3,), 7))}, DataError, "label 7"),
        ({"retain": (torch.zeros(0, 1, 4, 4), torch.ones(0))}, DataError, "retain is empty"),
        ({"retain": (torch.zeros(3, 1, 4, 4), torch.ones(2))}, DataError, "3 images and 2 labels"),
    ],
)
def test_what_is_at_fault_is_named(trained, samples, change, error, message):
    with pytest.raises(error, match=message):
        unlearn(trained, **{**samples, **SHORT, **change})


class Bare(torch.nn.Module):
    """A classifier whose last layer is none of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(16, 3))

    def forward(self, x):
        return x.flatten(1) @ self.weight


def test_a_model_without_a_linear_head(samples):
    result = unlearn(Bare(), **samples, **SHORT)
    assert result.history.steps == 3
    assert result.model.weight.abs().sum() > 0


def test_fewer_retained_samples_than_forgotten_classes():
    draw = torch.Generator().manual_seed(0)
    images, classes = torch.randn(26, 1, 4, 4, generator=draw), torch.arange(26) // 6
    classes[25] = 5
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6))
    gone = classes < 4
    result = unlearn(
        model, retain=(images[~gone], classes[~gone]), forget=(images[gone], classes[gone]),
        **short(noise={"steps": 3, "use": "both"}, labels={"source": "transition+prediction"}),
    )  # fmt: skip
    assert len(result.noise["negative"]) == 4
