"""Forget requests and the splits that follow from them."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from conftest import data_set

from megu_cli import data
from megu_cli.cli import tables
from megu_cli.errors import DataError
from megu_cli.report import content
from megu_cli.request.earlier import of_list, of_record, record, recorded
from megu_cli.request.resolve import Earlier, Kind, notes, resolve


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data_set("digits", validation=0.1)


@pytest.fixture(scope="module")
def coarse() -> data.Dataset:
    return data_set("digits", superclasses={"round": ["0", "6", "8", "9"], "other": ["1", "2", "3", "4", "5", "7"]})


def check(request, dataset) -> None:
    held_out = dataset.withheld[request.validation]
    parts = [set(p.tolist()) for p in (request.forget, request.retain, held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(dataset.train)
    assert not dataset.trainable[held_out].any()
    assert dataset.trainable[request.retain].all()


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
    three = data_set("digits", superclasses={"a": list("012"), "b": list("3456"), "c": list("789")})
    request = resolve(three, classes=["b"])
    assert (request.classes, request.concepts) == ([1], [3, 4, 5, 6])
    by_members = resolve(three, subclasses=["3", "4", "5", "6"])
    assert by_members.classes == [1]


def test_listed_images_belong_to_the_forget_set_even_if_held_out(digits, tmp_path):
    held = int(digits.withheld[0])
    kept = int(torch.where(digits.trainable)[0][0])
    (tmp_path / "list.csv").write_text(f"sample,why\n{digits.train.names[held]}\n{kept},some reason\n\n")
    request = resolve(digits, samples=tmp_path / "list.csv")
    assert request.forget.tolist() == sorted([held, kept])
    assert request.asked == sorted({int(digits.train.labels[i]) for i in (held, kept)})
    assert (request.classes, request.concepts) == ([], [])
    check(request, digits)


def test_a_list_of_all_of_a_class_forgets_the_class(digits, coarse, tmp_path):
    eights = torch.where((digits.train.labels == 8) & digits.trainable)[0].tolist()
    file = tmp_path / "list.csv"
    file.write_text("\n".join(map(str, eights)))
    request = resolve(digits, samples=file)
    assert (request.kind, request.classes, request.concepts, request.single) == ("classes", [8], [8], True)
    # Those that were held out are unknown to a retrained model, too: nothing is selected by them.
    assert 8 not in digits.held_out.labels[request.validation]
    assert notes(digits, request, "include")[1:] == [
        "all training images of 8 are among these: a retrained model would not know them; the request is as "
        "forget.classes would be"
    ]

    file.write_text("\n".join(map(str, [*eights, *torch.where(digits.train.labels == 3)[0][:2].tolist()])))
    mixed = resolve(digits, samples=file)
    assert (mixed.kind, mixed.classes) == ("samples", [8])
    # Of what was forgotten before, one after the other, nothing is left either.
    before = Earlier(torch.tensor(eights[:-1]))
    file.write_text(str(eights[-1]))
    assert resolve(digits, samples=file, earlier=before).classes == [8]

    file.write_text("\n".join(map(str, torch.where(coarse.train.concepts == 8)[0].tolist())))
    part = resolve(coarse, samples=file)
    assert (part.kind, part.classes, part.concepts) == ("subclasses", [], [8])


def test_lines_that_are_no_number(digits, tmp_path):
    (tmp_path / "list.csv").write_text("--5\n²\n-1\n")
    with pytest.raises(DataError) as error:
        resolve(digits, samples=tmp_path / "list.csv")
    for said in ("line 1: --5 is no image", "line 2: ² is no image", "line 3: -1 is no index"):
        assert said in error.value.message


def test_something_must_remain(digits):
    with pytest.raises(DataError, match=r"forget\.random leaves 0 of 10 classes"):
        resolve(digits, count=int(digits.trainable.sum()))


def test_a_random_share_follows_the_seed_and_spares_held_out_images(digits):
    request = resolve(digits, fraction=0.03, seed=1)
    assert len(request.forget) == round(0.03 * int(digits.trainable.sum()))
    assert digits.trainable[request.forget].all()
    assert resolve(digits, fraction=0.03, seed=1).digest == request.digest
    assert resolve(digits, fraction=0.03, seed=2).digest != request.digest
    assert len(resolve(digits, count=7).forget) == 7
    check(request, digits)


# -- requests as they come: people, copies, and what was forgotten before ---------------------------------------------


def owned(labels: list[int], subjects: list[int], contents: list[int], test: list[int]) -> data.Dataset:
    """Three classes of one-pixel images; equal contents are equal images."""
    mean = torch.zeros(1, 1, 1)

    def split(kind: str, content: list[int], of: list[int]) -> data.Split:
        names = [f"{kind}/{i}.png" for i in range(len(content))]
        y = torch.tensor(labels[: len(content)])
        pixels = torch.tensor(content, dtype=torch.uint8).view(-1, 1, 1, 1)
        return data.Split(data.MemoryImages(pixels), y, y, names, mean, mean + 1, kind, torch.tensor(of))

    classes = ["a", "b", "c"]
    train, unseen = split("train", contents, subjects), split("test", [200] * len(test), test)
    none = torch.empty(0, dtype=torch.int64)
    whole = data.Dataset(
        "x", classes, classes, torch.arange(3), train, train.view(none), unseen, none, ["ann", "bob", "cyd"]
    )
    return whole.withholding(torch.tensor([len(labels) - 1]))


@pytest.fixture
def album() -> data.Dataset:
    # Ann has images 0 and 3, and 5 is a copy of 3 that nobody is named for; Cyd is in the test images alone.
    return owned([0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 1, 0, -1, -1, 1, 1], [10, 11, 12, 13, 14, 13, 16, 17], [0, 2])


def test_a_person_with_all_copies(album):
    request = resolve(album, subjects=["ann"])
    assert request.kind == "subjects"
    assert request.forget.tolist() == [0, 3, 5]
    assert request.copies.tolist() == [5]
    assert notes(album, request, "include") == [
        "1 copy of the images to forget is forgotten with them: train/5.png",
        "1 test images are of the same subjects: they count as unseen, and stay in the test",
    ]
    check(request, album)
    only = resolve(album, subjects=["ann"], copies=False)
    assert only.forget.tolist() == [0, 3]
    assert "STAY" in notes(album, only, "warn")[0]
    assert 5 in only.retain


def test_classes_without_images_are_nothing_to_learn_from(album):
    more = [*album.classes, "d", "e"]
    wide = replace(album, classes=more, concepts=more, concept_class=torch.arange(5))
    with pytest.raises(DataError, match=r"forget\.classes leaves no training image"):
        resolve(wide, classes=["a", "b", "c"])


def test_a_person_who_is_all_of_a_class(album):
    request = resolve(album, subjects=["ann"], earlier=Earlier(torch.tensor([6])))
    assert (request.kind, request.section, request.single, request.classes) == ("subjects", "subjects", True, [0])
    whole = resolve(replace(album, train=replace(album.train, subjects=torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]))),
                    subjects=["ann"])  # fmt: skip
    assert whole.kind == "subjects"
    assert [line[:40] for line in notes(album, whole, "include")] == [
        "all training images of a are among these",
        "1 copy of the images to forget is forgot",
        "1 test images are of the same subjects: ",
    ]


def test_people_who_are_not_there(album, digits):
    with pytest.raises(DataError, match="'an'; did you mean 'ann'"):
        resolve(album, subjects=["an"])
    with pytest.raises(DataError, match="matches no training image"):
        resolve(album, subjects=["cyd"])
    with pytest.raises(DataError, match="whose images they are"):
        resolve(digits, subjects=["ann"])


def test_copies_of_listed_images(album, tmp_path):
    (tmp_path / "list.csv").write_text("./train/3.png\n")
    assert resolve(album, samples=tmp_path / "list.csv").forget.tolist() == [3, 5]
    assert resolve(album, samples=tmp_path / "list.csv", copies=False).forget.tolist() == [3]


@pytest.mark.parametrize(
    ("line", "part"),
    [("test/0.png", "is a test image"), ("0.jpg", "is no image of the data"), ("../0.png", "is no image of the data")],
)
def test_lines_that_name_nothing_to_forget(album, tmp_path, line, part):
    (tmp_path / "list.csv").write_text(f"{line}\n")
    with pytest.raises(DataError, match=part):
        resolve(album, samples=tmp_path / "list.csv")


def test_accents_in_a_list_may_be_written_either_way(tmp_path):
    accented = owned([0, 1, 2], [0, 1, 1], [1, 2, 3], [0])
    accented.train.names[1] = "train/e\u0301.png"
    (tmp_path / "list.csv").write_text("\u00e9.png\n", encoding="utf-8")
    assert resolve(accented, samples=tmp_path / "list.csv").forget.tolist() == [1]


def test_what_was_forgotten_stays_out_of_everything(digits):
    first = resolve(digits, classes=["8"])
    earlier = of_record(digits, *recorded(record(digits, first), "run"))
    second = resolve(digits, classes=["3"], earlier=earlier)
    assert second.classes == second.concepts == [3, 8]
    assert second.asked == [3]
    assert torch.equal(second.already, first.forget)
    assert not torch.isin(digits.train.labels[second.retain], torch.tensor([3, 8])).any()
    assert not torch.isin(digits.held_out.labels[second.validation], torch.tensor([3, 8])).any()
    assert second.digest != resolve(digits, classes=["3"]).digest
    # The record of the second names both, so a third run need only name the second.
    assert record(digits, second) == {"concepts": ["3", "8"], "images": []}
    random = resolve(digits, count=50, earlier=earlier)
    assert not (digits.train.labels[random.forget] == 8).any()
    with pytest.raises(DataError, match=r"nothing that forget\.already does not name"):
        resolve(digits, classes=["8"], earlier=earlier)
    with pytest.raises(DataError, match="leaves 1 of 10 classes"):
        resolve(digits, classes=[str(i) for i in range(8)], earlier=earlier)


def test_single_images_are_recorded_by_content_and_never_by_name(digits):
    first = resolve(digits, count=9, seed=3)
    written = record(digits, first)
    assert len(written["images"]) == 9
    assert all(len(image) == 16 for image in written["images"])
    earlier = of_record(digits, *recorded(written, "run"))
    assert earlier.positions.tolist() == first.forget.tolist()
    fewer = data_set("digits", validation=0.1, limit=700)  # other positions, and some are gone
    known = of_record(fewer, *recorded(written, "run"))
    there = {digits.train.names[i] for i in first.forget} & set(fewer.train.names)
    assert {fewer.train.names[i] for i in known.positions} == there
    with pytest.raises(DataError, match="run1 does not say what was forgotten"):
        recorded(None, "run1")


def test_an_earlier_list_may_name_what_is_gone(digits, tmp_path):
    (tmp_path / "list.csv").write_text("train/3\nnot/there.png\n")
    found = of_list(digits, tmp_path / "list.csv", "ignore")
    assert found.positions.tolist() == [3]
    assert found.told == ("forget.already: 1 of 2 lines of list.csv matched",)
    with pytest.raises(DataError, match=r"not/there\.png is no image") as error:
        of_list(digits, tmp_path / "list.csv")
    assert "forget.already_missing: ignore" in error.value.hint


@pytest.mark.parametrize("kind", get_args(Kind))
def test_tables_and_reports_have_words_for_every_kind_of_request(kind):
    request = {"kind": kind, "concepts": ["cat"], "forget": 40, "retain": 60}
    assert content._what(request)
    assert "Forgotten:  (" not in tables._title(request)
