"""Forget requests and the splits that follow from them."""

from __future__ import annotations

import pytest
import torch

from megu_cli import data
from megu_cli.forget import resolve


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", validation=0.1)


@pytest.fixture(scope="module")
def coarse() -> data.Dataset:
    return data.load("digits", superclasses={"round": ["0", "6", "8", "9"], "other": ["1", "2", "3", "4", "5", "7"]})


def check(request, dataset) -> None:
    parts = [set(p.tolist()) for p in (request.forget, request.retain, request.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(dataset.train)
    assert dataset.validation[request.validation].all()
    assert not dataset.validation[request.retain].any()


def test_a_class_by_name_first_then_by_index(digits):
    by_name, by_number = resolve(digits, classes=["8"]), resolve(digits, classes=[8])
    assert by_name.digest == by_number.digest
    assert by_name.classes == by_name.concepts == by_name.asked == [8]
    assert torch.equal(by_name.forget, torch.where(digits.train.labels == 8)[0])
    check(by_name, digits)


def test_two_classes(digits):
    request = resolve(digits, classes=["3", "8", "3"])
    assert request.classes == [3, 8]
    check(request, digits)


def test_a_sub_class_leaves_its_superclass(coarse):
    request = resolve(coarse, subclasses=["8"])
    assert (request.classes, request.concepts, request.asked) == ([], [8], [8])
    assert set(coarse.train.concepts[request.forget].tolist()) == {8}
    check(request, coarse)


def test_a_whole_superclass_forgets_its_members():
    three = data.load("digits", superclasses={"a": list("012"), "b": list("3456"), "c": list("789")})
    request = resolve(three, classes=["b"])
    assert (request.classes, request.concepts) == ([1], [3, 4, 5, 6])
    by_members = resolve(three, subclasses=["3", "4", "5", "6"])
    assert by_members.classes == [1]


def test_listed_images_belong_to_the_forget_set_even_if_held_out(digits, tmp_path):
    held = int(torch.where(digits.validation)[0][0])
    kept = int(torch.where(~digits.validation)[0][0])
    (tmp_path / "list.csv").write_text(f"path\n{digits.train.names[held]}\n{kept},some reason\n\n")
    request = resolve(digits, samples=tmp_path / "list.csv")
    assert request.forget.tolist() == sorted([held, kept])
    assert request.asked == sorted({int(digits.train.labels[i]) for i in (held, kept)})
    assert (request.classes, request.concepts) == ([], [])
    check(request, digits)


def test_a_random_share_follows_the_seed_and_spares_held_out_images(digits):
    request = resolve(digits, fraction=0.03, seed=1)
    assert len(request.forget) == round(0.03 * int((~digits.validation).sum()))
    assert not digits.validation[request.forget].any()
    assert resolve(digits, fraction=0.03, seed=1).digest == request.digest
    assert resolve(digits, fraction=0.03, seed=2).digest != request.digest
    assert len(resolve(digits, count=7).forget) == 7
    check(request, digits)
