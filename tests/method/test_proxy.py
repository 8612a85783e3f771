"""The proxy: a small network that never sees the forget set, and the maps from its answers to the original's."""

from __future__ import annotations

import pytest
import torch
from conftest import write_config

from megu_cli.config import ProxyConfig, load_config
from megu_cli.data import MemoryImages, Split
from megu_cli.execution import Execution
from megu_cli.method import proxy
from megu_cli.pipeline.context import RunContext
from megu_cli.run import artifacts

FAST = ProxyConfig(networks=1, passes=6)


def sides(like: torch.Tensor, labels: torch.Tensor, marked: torch.Tensor | None = None) -> Split:
    """Images bright on the left (1) or on the right (2), some with a mark at the bottom."""
    pixels = torch.randint(0, 120, (len(like), 1, 16, 16), generator=torch.Generator().manual_seed(0))
    pixels[like == 1, :, :, :8] += 100
    pixels[like == 2, :, :, 8:] += 100
    if marked is not None:
        pixels[marked, :, 12:, 4:12] = 255
    names = [str(i) for i in range(len(like))]
    images = MemoryImages(pixels.to(torch.uint8))
    return Split(images, labels, labels, names, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), "sides")


def test_it_says_of_the_forgotten_what_they_look_like_and_the_same_from_the_same_seed():
    # Class 0 is forgotten: half of its images look like those of class 1, half like those of class 2.
    labels = torch.tensor([0, 1, 2]).repeat(60)
    like = torch.where(labels > 0, labels, 1 + torch.arange(180) // 3 % 2)
    split = sides(like, labels)
    gone, kept = torch.where(labels == 0)[0], torch.where(labels > 0)[0]
    said = proxy.answers(split, kept, split.view(gone), 3, FAST, Execution(eval_batch=50))
    assert said[:, 1:].argmax(1).add(1).tolist() == like[gone].tolist()
    assert (said.argmax(1) > 0).all()  # it has never seen the class
    assert torch.allclose(said.exp().sum(1), torch.ones(60).double())
    torch.rand(5)  # the global generator has no say
    assert torch.equal(said, proxy.answers(split, kept, split.view(gone), 3, FAST, Execution(eval_batch=50)))
    assert not torch.equal(
        said, proxy.answers(split, kept, split.view(gone), 3, FAST, Execution(seed=1, eval_batch=50))
    )


def test_of_a_sub_class_that_it_never_saw_it_gets_right_what_looks_like_the_rest_of_the_class():
    # Sub-classes 0 (left) and 2 (marked) are class 0, and 1 (right) is class 1. A quarter of 2 is on the left.
    concepts = torch.tensor([0, 1, 2]).repeat(80)
    labels = (concepts == 1).long()
    like = torch.where(concepts < 2, concepts + 1, torch.where(torch.arange(240) // 3 % 4 == 0, 1, 2))
    split = sides(like, labels, concepts == 2)
    gone, kept = torch.where(concepts == 2)[0], torch.where(concepts < 2)[0]
    said = proxy.answers(split, kept, split.view(gone), 2, FAST, Execution(eval_batch=50))
    assert (said.argmax(1) == 0).double().mean().item() == pytest.approx(0.25, abs=0.1)


def test_it_trains_on_no_image_but_the_retained(megu, tmp_path, monkeypatch):
    """Neither on the forgotten, nor on a copy of one, nor on what was forgotten earlier, nor on held-out images."""
    (tmp_path / "list.csv").write_text("3\n4\n")
    (tmp_path / "earlier.csv").write_text("7\n")
    settings = {"forget": {"samples": "list.csv", "already": [str(tmp_path / "earlier.csv")]}}
    work = RunContext.open(load_config(write_config(tmp_path, **settings)))
    work.inputs.data.train.images.pixels[9] = work.inputs.data.train.images.pixels[3]  # a copy that nobody listed
    read: list[int] = []
    trained = proxy._trained

    def spied(images, *rest):
        read.extend(asked)
        return trained(images, *rest)

    asked: list[int] = []
    batches = Split.batches

    def noted(self, order, device="cpu"):
        asked.extend(i for positions in order for i in positions.tolist())
        return batches(self, order, device)

    monkeypatch.setattr(proxy, "_trained", spied)
    monkeypatch.setattr(Split, "batches", noted)
    request = work.inputs.request
    assert 9 in request.forget.tolist()
    proxy.answers(work.inputs.data.train, request.retain, work.inputs.data.train.view(request.forget), 10, FAST)
    assert set(read) == set(request.retain.tolist())
    assert not set(read) & {3, 4, 7, 9, *work.inputs.data.withheld.tolist()}


def test_the_temperature_makes_it_as_sure_as_the_original():
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double()
    said = logits.log_softmax(1)
    for t in (0.4, 1.0, 2.5):
        assert proxy.temperature(said, logits / t) == pytest.approx(t, rel=1e-6)
    masked = said.index_fill(1, torch.tensor([2]), float("-inf"))
    assert 0.05 < proxy.temperature(masked, masked / 0.5) == pytest.approx(0.5, rel=1e-6)
    assert proxy.temperature(said[:0], logits[:0]) == 1


def test_the_mapping_finds_scale_and_bonus():
    draw = torch.Generator().manual_seed(0)
    said = torch.randn(400, 4, generator=draw).double().log_softmax(1)
    true = torch.randint(4, (400,), generator=draw)
    planted = proxy.Mapping(0.7, 1.3)
    found = proxy.mapping(said, planted(said, true).log(), true)
    # The scale is one of a grid in steps of 5%, and the bonus lies between those of two images.
    assert (found.scale, found.bonus) == pytest.approx((0.7, 1.3), rel=0.03)
    expected = (0.7 * (said[0] + 1.3 * torch.eye(4)[true[0]])).softmax(0)
    assert torch.allclose(planted(said, true)[0], expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_a_mapped_answer_is_right_as_often_as_the_original(share):
    draw = torch.Generator().manual_seed(1)
    said = torch.randn(200, 4, generator=draw).double().log_softmax(1)
    true = torch.randint(4, (200,), generator=draw)
    right = torch.linspace(0, 1, 200) <= share
    original = 3 * torch.nn.functional.one_hot(torch.where(right, true, (true + 1) % 4), 4).double()
    mapped = proxy.mapping(said, original, true)(said, true)
    found = int((mapped.argmax(1) == true).sum())
    assert abs(found - int(right.sum())) <= 1


def test_sides_passes_and_steps():
    assert [proxy._side(pixels) for pixels in (2, 6, 8, 20, 28, 64, 224)] == [4, 6, 8, 10, 14, 32, 32]
    auto = ProxyConfig()
    assert [proxy.passes(auto, images) for images in (100, 3000, 6000, 50_000)] == [40, 20, 10, 10]
    assert proxy.passes(ProxyConfig(passes=3), 100) == 3
    assert proxy.steps(auto, 6000) == 2 * 10 * 47


def answering(monkeypatch, accuracy: float) -> None:
    """Let the proxy be right on a share of the images that it is asked about; else it says the next class."""

    def answers(split, retain, asked, classes, settings, execution):
        labels = asked.labels
        right = torch.linspace(0, 1, len(asked)) < accuracy
        said = torch.full((len(asked), classes), 0.01).double()
        said[torch.arange(len(asked)), torch.where(right, labels, (labels + 1) % classes)] = 1
        return (said / said.sum(1, keepdim=True)).log()

    monkeypatch.setattr(proxy, "answers", answers)


def test_a_poor_proxy_is_not_asked_further(megu, tmp_path, monkeypatch):
    answering(monkeypatch, 0.1)
    file = write_config(tmp_path)
    assert megu("train", "-c", file).code == 0
    answer = megu("run", "-c", file)
    assert answer.code == 0, answer.err
    body = artifacts.read_body(tmp_path / "run" / "labels.safetensors")
    assert body["mode"] == "hard"
    assert body["proxy"]["held_out_acc"] < 0.5 * body["proxy"]["original_held_out_acc"]
    assert "labels come from the ratings and the prediction instead" in " ".join(answer.err.split())
    assert artifacts.read_body(tmp_path / "run" / "noise.safetensors")["use"] == "negative"
    assert megu("labels", "-c", file, "--set", "labels.source=proxy").code == 0  # as the config insists
    assert artifacts.read_body(tmp_path / "run" / "labels.safetensors")["mode"] == "proxy"


def test_the_ratings_count_more_the_less_accurate_the_proxy_is(megu, tmp_path, monkeypatch):
    file = write_config(tmp_path, train={"epochs": 8, "batch": 32})
    assert megu("run", "-c", file).code == 0
    counted = {}
    for accuracy in (1.0, 0.7):
        answering(monkeypatch, accuracy)
        assert megu("labels", "--force", "-c", file, "--set", "labels.source=proxy").code == 0
        made = artifacts.read(tmp_path / "run" / "labels.safetensors")
        counted[accuracy] = made.body["proxy"]["ratings"]
        assert made.tensors["target"][:, 8].max() == 0  # nothing goes to the forgotten class
        assert torch.allclose(made.tensors["target"].sum(1), torch.ones(1))
    assert counted[1.0] == 0 < counted[0.7] <= 2
