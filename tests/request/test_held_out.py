"""Held-out images that come from the test split, for a model that has seen every training image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_set, write_config
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from megu_cli import data
from megu_cli.config import Config, MLLMConfig, changed, load_config
from megu_cli.data.images import EncodedImages, Joined, MemoryImages, Selected
from megu_cli.data.loading import holding_out
from megu_cli.data.names import hashed
from megu_cli.errors import ConfigError, DataError
from megu_cli.evaluation import measure
from megu_cli.models.preflight import check
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import evaluation_problem, fresh
from megu_cli.request.earlier import EarlierRequests, of_record
from megu_cli.request.questions import questions
from megu_cli.request.resolve import Earlier, Request, resolve
from megu_cli.run.artifacts import digest

COARSE = {"round": ["0", "6", "8", "9"], "other": ["1", "2", "3", "4", "5", "7"]}


@pytest.fixture(scope="module")
def plain() -> data.Dataset:
    return data_set("digits", validation=0.05)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data_set("digits", validation=0.05, validation_from="test")


def folders(root: Path, train: int = 6, test: int = 5, size: int = 12) -> Path:
    """Images of their own in train/CLASS and test/CLASS."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        for name in ("cat", "dog", "eel"):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def photos(root: Path, **settings: object) -> data.Dataset:
    return data_set("imagefolder", root=root, image_size=8, **{"validation_from": "test", **settings})


def people(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A manifest of (label, split, subject) with a picture for each line."""
    rng = np.random.default_rng(1)
    lines = ["path,label,split,subject"]
    for i, row in enumerate(rows):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(",".join((f"{i}.png", *row)))
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder / "m.csv"


def everything(images: data.Images) -> Tensor:
    return next(iter(images.batches([torch.arange(len(images))])))


# -- which ---------------------------------------------------------------------------------------------------------


def source(name: str = "small_cnn", **model: object) -> str:
    config = Config(data={"name": "digits"}, model={"name": name, **model}, forget={"classes": ["8"]})
    return config.data.validation_from


def test_auto_is_test_for_weights_of_the_users_own(tmp_path):
    assert source() == "train"
    assert source(checkpoint="weights.pth") == "test"
    assert source("torchvision:resnet18") == "train"
    bare, full = tmp_path / "bare", tmp_path / "full"
    for folder in (bare, full):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (full / "model.safetensors.index.json").write_text("{}")
    assert source(f"hf:{bare}") == "train"
    assert source(f"hf:{full}") == "test"
    assert source(f"hf:{bare}", checkpoint=bare / "mine.pth") == "test"
    assert source("hf:somebody/vit") == "test"  # a hub id without weights is refused


def test_what_is_said_is_kept_and_what_was_resolved_stays(tmp_path):
    mine = write_config(tmp_path / "mine", model={"checkpoint": "mine.pth"})
    assert load_config(mine).data.validation_from == "test"
    assert load_config(mine, ["data.validation_from=train"]).data.validation_from == "train"
    assert load_config(mine, ["model.checkpoint=null"]).data.validation_from == "train"
    # `megu compare` names the original that megu trained: on the data that it was trained with.
    base = load_config(write_config(tmp_path / "base"))
    assert changed(base, {"model.checkpoint": tmp_path / "original.safetensors"}).data == base.data


# -- how many ------------------------------------------------------------------------------------------------------


def test_test_images_are_held_out_and_no_training_image(digits, plain):
    assert plain.borrowed == 0
    assert len(digits.train) == len(plain.train)
    assert len(digits.held_out) == digits.borrowed
    assert digits.trainable.all()
    # Of 30 or 40 test images a class there are no 50: half of them, and nothing is there twice or lost.
    there = torch.bincount(plain.test.labels)
    assert torch.equal(torch.bincount(digits.held_out.labels), there // 2)
    assert torch.equal(torch.bincount(digits.test.labels), there - there // 2)
    lent = digits.held_out.names
    assert set(lent).isdisjoint(digits.test.names)
    assert {*lent, *digits.test.names} == set(plain.test.names)
    place = {name: i for i, name in enumerate(plain.test.names)}
    assert torch.equal(
        everything(digits.held_out.images), everything(plain.test.images)[[place[name] for name in lent]]
    )
    assert torch.equal(
        everything(digits.test.images), everything(plain.test.images)[[place[n] for n in digits.test.names]]
    )


@pytest.mark.parametrize(("train", "test", "share", "taken"),
                         [(10, 8, 0.1, 4), (10, 160, 0.1, 50), (90, 170, 0.9, 81), (10, 1, 0.1, 0),
                          (10, 8, 0, 0)])  # fmt: skip
def test_as_many_as_are_asked_for_and_fifty_and_never_more_than_half(tmp_path, train, test, share, taken):
    pixels = np.zeros((1, 1), np.uint8)
    for split, number in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.bmp")
    made = data_set("imagefolder", root=tmp_path, image_size=1, validation=share, validation_from="test")
    assert made.borrowed == 2 * taken
    assert torch.bincount(made.held_out.labels, minlength=2).tolist() == [taken, taken]
    assert made.trainable.all()
    assert len(made.test) == 2 * (test - taken)


def test_the_choice_follows_the_name_alone(tmp_path):
    few = photos(folders(tmp_path / "few", test=20))
    more = photos(folders(tmp_path / "more", train=9, test=20))
    assert list(few.held_out.names) == list(more.held_out.names) != []
    ranks = hashed(few.held_out.names, "validation")
    assert max(ranks[:10]) < min(hashed([n for n in few.test.names if "/cat/" in n], "validation"))


def test_a_persons_images_are_borrowed_all_or_none(tmp_path):
    rows = [(label, "train", "") for label in ("cat", "dog") for _ in range(4)]
    rows += [(label, "test", f"p{i}") for i in range(12) for label in ("cat", "cat", "dog")]
    rows += [("dog", "test", "")] * 6
    made = data_set("manifest", manifest=people(tmp_path, rows), image_size=8, validation_from="test")
    lent, rest = made.held_out.subjects, made.test.subjects
    assert not set(lent.tolist()) & set(rest.tolist()) - {-1}
    cats, dogs = torch.bincount(made.held_out.labels, minlength=2).tolist()
    # Of 24 cats, two with each person, and of 18 dogs.
    assert 0 < cats <= 12
    assert 0 < dogs <= 9
    assert len(made.train) == 8


def test_a_test_split_that_is_made_here_may_have_been_seen(tmp_path):
    root = folders(tmp_path) / "train"
    made, given = (photos(root, validation=0.3, validation_from=source) for source in ("test", "train"))
    assert made.test_made
    assert made.borrowed == 0
    assert len(made.held_out)
    assert torch.equal(made.withheld, given.withheld)
    assert (made.digest, made.test.digest) == (given.digest, given.test.digest)


def test_digests_follow_what_is_borrowed(digits, plain):
    again = data_set("digits", validation=0.05, validation_from="test")
    assert (again.digest, again.test.digest) == (digits.digest, digits.test.digest)
    assert {digits.digest, digits.test.digest}.isdisjoint({plain.digest, plain.test.digest})
    assert data_set("digits", validation=0, validation_from="test").digest == plain.digest
    # Keys of earlier versions stay valid: also of classes in another order.
    assert digits.digest.startswith("b53a8b7f9ac97905")
    assert digits.test.digest.startswith("4d75923fe875da42")
    assert plain.digest.startswith("58f591e5aa6ca53a")
    other = data.reordered(digits, [1, 0, *range(2, 10)])
    assert other.digest.startswith("9097bac90083b8cd")
    assert other.test.digest.startswith("5aa8625210633283")


def test_another_share_is_another_digest(tmp_path):
    root = folders(tmp_path, train=60, test=120, size=2)
    some, more = (
        data_set("imagefolder", root=root, image_size=2, validation=v, validation_from="test") for v in (0.05, 0.9)
    )
    assert (some.borrowed, more.borrowed) == (150, 162)
    assert some.digest != more.digest
    assert some.test.digest != more.test.digest


def test_a_requests_digest_counts_held_out_images_behind_the_training_images():
    # As keys of earlier versions do, in which one split held both.
    where = {"forget": torch.tensor([3]), "retain": torch.tensor([1, 2]), "validation": torch.tensor([1])}
    request = Request(
        "samples", **where, classes=[], concepts=[], asked=[0], known=torch.tensor([0, 2]), train_images=9
    )
    assert request.digest == digest(["samples", [3], 2, [], [], {"known": [9, 11]}])


# -- images of two rows --------------------------------------------------------------------------------------------


def both(dataset: data.Dataset) -> Joined:
    """The training images, and behind them the held-out ones."""
    return dataset.train.followed_by(dataset.held_out).images


def test_held_out_training_images_are_those_of_the_training_split(plain):
    assert isinstance(plain.held_out.images, Selected)  # nothing is copied
    positions = plain.withheld
    assert 0 < len(positions) == len(plain.held_out) < len(plain.train)
    assert torch.equal(positions, torch.where(~plain.trainable)[0])
    assert torch.equal(everything(plain.held_out.images), everything(plain.train.images)[positions])
    assert torch.equal(plain.held_out.images.contents(), plain.train.images.contents()[positions])
    assert torch.equal(plain.held_out.images[2], plain.train.images[int(positions[2])])
    assert torch.equal(plain.held_out.labels, plain.train.labels[positions])
    assert list(plain.held_out.names) == [plain.train.names[i] for i in positions.tolist()]
    assert torch.equal(
        everything(plain.held_out.at(torch.tensor([3, 1])).images), everything(plain.held_out.images)[[3, 1]]
    )
    assert plain.held_out_among(positions[:2]).tolist() == [True, True] + [False] * (len(positions) - 2)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_images_are_those_in_memory(tmp_path, workers):
    root = folders(tmp_path, test=8)
    whole = photos(root)
    streamed = photos(root, memory_limit=1e-9, workers=workers)
    streamed, whole = both(streamed), both(whole)
    assert len(streamed) == 18 + 12
    expected = everything(whole)
    order = [torch.tensor(index) for index in ([29, 0, 18, 17], [1, 2], [20, 25], [18, 3, 3], [29])]
    for images in (streamed, whole):
        found = list(images.batches(order))
        assert [len(block) for block in found] == [4, 2, 2, 3, 1]
        assert all(torch.equal(block, expected[index]) for block, index in zip(found, order, strict=True))
    assert not any(part._kept for part in (streamed.first, streamed.second))
    assert all(torch.equal(streamed[i], expected[i]) for i in (0, 17, 18, 29))
    contents = streamed.contents()
    assert torch.equal(contents, whole.contents())
    # In any order, and of one row alone.
    for index in ([25, 3, 18, 0], [4, 2], [29, 19], [5]):
        part = streamed.at(torch.tensor(index))
        assert torch.equal(everything(part), expected[index])
        assert torch.equal(part[len(index) - 1], expected[index[-1]])
        assert torch.equal(part.contents(), contents[index])
        last = torch.tensor([len(index) - 1])
        assert torch.equal(everything(part.at(last)), expected[index[-1:]])


def test_one_row_in_memory_and_one_streamed(tmp_path):
    root = folders(tmp_path)
    streamed, kept = both(photos(root, memory_limit=1e-9)), both(photos(root))
    expected = everything(kept)
    mixed = Joined(MemoryImages(expected[:18]), streamed.second)
    assert torch.equal(everything(mixed), expected)
    # What is to be kept is not decoded for nothing.
    assert isinstance(kept.second, EncodedImages)
    fresh = both(photos(root))
    assert torch.equal(next(iter(fresh.batches([torch.tensor([4, 2])]))), expected[[4, 2]])
    assert fresh.second._kept is None


def test_a_batch_is_decoded_when_it_is_asked_for(tmp_path):
    images = both(photos(folders(tmp_path), memory_limit=1e-9))
    decoded = []
    for part in (images.first, images.second):
        decode = part.decode
        part.decode = lambda name, content, decode=decode: (decoded.append(name), decode(name, content))[1]
    blocks = iter(images.batches([torch.tensor([i, len(images) - 1 - i]) for i in range(5)]))
    next(blocks)
    assert len(decoded) == 2
    next(blocks)
    assert len(decoded) == 4


# -- in no set but the held-out one --------------------------------------------------------------------------------


def fits(request: Request, dataset: data.Dataset) -> Tensor:
    """The positions of held-out images to validate on, after a look at all sets."""
    for positions in (request.forget, request.retain, request.already, request.copies):
        assert (positions < len(dataset.train)).all()
    assert (request.validation < dataset.borrowed).all()
    assert not torch.isin(dataset.held_out.concepts[request.validation], torch.tensor(request.concepts)).any()
    both = torch.cat([request.forget, request.retain, request.already])
    assert len(both.unique()) == len(both) == len(dataset.train)
    return request.validation


def test_whole_classes_and_random_images(digits):
    request = resolve(digits, classes=["8"])
    held = fits(request, digits)
    assert len(held) == int((digits.held_out.labels != 8).sum())
    assert torch.equal(request.forget, torch.where(digits.train.labels == 8)[0])
    for seed in range(3):
        assert len(fits(resolve(digits, fraction=0.5, seed=seed), digits)) == digits.borrowed
    assert len(resolve(digits, fraction=0.5).forget) == round(0.5 * len(digits.train))


def test_sub_classes():
    coarse = data_set("digits", validation_from="test", superclasses=COARSE)
    request = resolve(coarse, subclasses=["8"])
    held = fits(request, coarse)
    assert len(held) == int((coarse.held_out.concepts != 8).sum())
    assert set(coarse.train.concepts[request.forget].tolist()) == {8}


def test_people_their_copies_and_what_was_forgotten_before(tmp_path):
    rows = [("cat", "train", "ann"), ("dog", "train", "bob"), ("eel", "train", ""), ("eel", "train", "")]
    rows += [("cat", "train", ""), ("dog", "train", "")]
    rows += [(label, "test", person) for person in ("ann", "bob", "cyd", "dan") for label in ("cat", "dog", "eel")] * 3
    file = people(tmp_path, rows)
    # Line 2 holds the image of a training line that nobody is named for, in the test.
    album = data_set("manifest", manifest=file, image_size=8, validation_from="test")
    lent = {album.subjects[i]: torch.where(album.held_out.subjects == i)[0] for i in range(4)}
    person = next(name for name in ("ann", "bob") if len(lent[name]))
    request = resolve(album, subjects=[person])
    held = fits(request, album)
    assert request.forget.tolist() == [0 if person == "ann" else 1]
    assert sorted(held.tolist()) == sorted(i for name, where in lent.items() if name != person for i in where.tolist())
    unknown = next(name for name in ("cyd", "dan") if len(lent[name]))
    with pytest.raises(DataError, match="matches no training image"):
        resolve(album, subjects=[unknown])

    # A borrowed image that is a copy of one to forget, and one that an earlier request has named.
    name = album.held_out.names[int(lent[person][0])]
    (tmp_path / "3.png").write_bytes((tmp_path / name).read_bytes())
    album = data_set("manifest", manifest=file, image_size=8, validation_from="test")
    (tmp_path / "list.csv").write_text("3.png\n")
    request = resolve(album, samples=tmp_path / "list.csv")
    assert request.forget.tolist() == [3]
    assert len(request.copies) == 0
    assert len(fits(request, album)) == album.borrowed - 1
    stays = resolve(album, samples=tmp_path / "list.csv", copies=False)
    assert len(fits(stays, album)) == album.borrowed
    earlier = of_record(album, [], album.train.images.contents()[[3]].tolist())
    request = resolve(album, subjects=["ann"], earlier=earlier)
    assert request.already.tolist() == [3]
    fits(request, album)
    request = resolve(album, subjects=["ann"], earlier=Earlier(torch.tensor([2]), [2]))
    assert not (album.held_out.labels[fits(request, album)] == 2).any()


def test_lists_name_training_images_only(digits, tmp_path):
    file = tmp_path / "list.csv"
    number = len(digits.train)
    file.write_text(f"{number - 1}\n{digits.train.names[0]}\n")
    assert resolve(digits, samples=file).forget.tolist() == [0, number - 1]
    file.write_text(f"{number}\n")
    with pytest.raises(DataError, match=f"{number} is no index below {number}"):
        resolve(digits, samples=file)
    for name in (digits.held_out.names[0], digits.test.names[0]):
        file.write_text(f"{name}\n")
        with pytest.raises(DataError, match="is a test image"):
            resolve(digits, samples=file)
    # Named without their folder, images of test/ that have no namesake in train/ are told as well.
    album = photos(folders(tmp_path, train=1, test=6))
    for name in (*album.held_out.names, *album.test.names):
        if not name.endswith("/0.png"):
            file.write_text(f"{name.removeprefix('test/')}\n")
            with pytest.raises(DataError, match="is a test image"):
                resolve(album, samples=file)


def test_an_earlier_random_request_is_drawn_from_what_was_held_out_then(tmp_path):
    random = {"random": {"count": 40}}
    first = load_config(write_config(tmp_path / "first", forget=random))
    file = write_config(tmp_path / "second", model={"checkpoint": "mine.safetensors"}, forget={"classes": ["3"]})
    data_then, data_now = (RunContext.open(config).inputs.data for config in (first, load_config(file)))
    then = resolve(data_then, count=40)
    assert data_now.borrowed
    known = EarlierRequests([tmp_path / "first" / "megu.yaml"], None).resolved(data_now)
    assert torch.equal(known.positions, then.forget)
    assert not torch.equal(resolve(data_now, count=40).forget, then.forget)
    assert torch.equal(holding_out(data_now, 0.1).withheld, data_then.withheld)


def test_a_config_among_earlier_requests_stands_for_those_before_it_too(tmp_path):
    first = write_config(tmp_path / "a", forget={"classes": ["8"]})
    drawn = {"random": {"count": 5}, "already": [str(first)]}
    second = write_config(tmp_path / "b", forget=drawn)
    own = RunContext.open(load_config(second))
    third = write_config(tmp_path / "c", forget={"classes": ["3"], "already": [str(second)]})
    request = RunContext.open(load_config(third)).inputs.request
    assert request.classes == [3, 8]
    eights = torch.where(own.inputs.data.train.labels == 8)[0].tolist()
    threes = own.inputs.request.forget[own.inputs.data.train.labels[own.inputs.request.forget] == 3].tolist()
    assert request.already.tolist() == sorted({*eights, *own.inputs.request.forget.tolist()} - {*threes})

    write_config(tmp_path / "a", forget={"classes": ["8"], "already": [str(second)]})
    with pytest.raises(ConfigError, match="leads back to itself"):
        _ = RunContext.open(load_config(third)).inputs.request
    write_config(tmp_path / "a", forget={"classes": ["8"]})
    with pytest.raises(ConfigError, match="draws or counts images in other data"):
        _ = RunContext.open(load_config(third, ["data.limit=500"])).inputs.request


def test_what_earlier_configs_name_is_in_no_test_split_that_is_made_here(tmp_path):
    root = folders(tmp_path / "images", train=10) / "train"
    settings = {"name": "imagefolder", "root": str(root), "image_size": 2, "limit": None}
    plain = RunContext.open(load_config(write_config(tmp_path / "plain", data=settings, forget={"classes": [0]})))
    named = plain.inputs.data.test.names[0]
    (tmp_path / "list.csv").write_text(f"{named}\n")
    before = write_config(tmp_path / "a", data=settings, forget={"samples": "../list.csv"})
    after = write_config(tmp_path / "b", data=settings, forget={"classes": [0], "already": [str(before)]})
    work = RunContext.open(load_config(after))
    assert named in work.inputs.data.train.names
    assert named not in work.inputs.data.test.names
    # An index would name another image as soon as one more is reserved.
    (tmp_path / "list.csv").write_text("0\n")
    with pytest.raises(DataError, match="an index names nothing that lasts"):
        _ = RunContext.open(load_config(before)).inputs.request


# -- what is measured ----------------------------------------------------------------------------------------------


def test_no_figure_of_training_images_counts_what_is_borrowed(tmp_path):
    """Those of a data set with nothing held out, to the last digit."""
    settings = {"data": {"limit": 150, "validation": 0}, "forget": {"classes": ["8"]},
                "eval": {"probe_samples": 10_000, "batch": 64}}  # fmt: skip
    plain = RunContext.open(load_config(write_config(tmp_path, **settings)))
    lent = RunContext.open(load_config(tmp_path / "megu.yaml", ["data.validation=0.1", "data.validation_from=test"]))
    assert lent.inputs.data.borrowed
    assert torch.equal(lent.inputs.request.retain, plain.inputs.request.retain)
    assert evaluation_problem(lent).sample.probed.tolist() == evaluation_problem(plain).sample.probed.tolist()
    figures = []
    for work in (plain, lent):
        problem = evaluation_problem(work)
        seen = measure.Predictions.of(fresh(work, "some").eval(), problem, "some")
        other = measure.Predictions.of(fresh(work, "other").eval(), problem, "other")
        assert len(seen.train.predicted) == 150
        assert len(seen.test.predicted) == len(work.inputs.data.test)
        measured = measure.Measurement(problem, seen, other)
        own = measured.figures
        figures.append([
            own["retain_train_acc"], own["forget_train_acc"], own["zrf"],
            measure.per_class(seen, work.inputs.data)["train"],
            measured.entanglement,
        ])  # fmt: skip
    assert figures[0] == figures[1]
    assert measure.described(plain.inputs.data, plain.inputs.request) == measure.described(
        lent.inputs.data, lent.inputs.request
    )


def test_neither_rater_nor_preflight_is_shown_what_is_borrowed(digits):
    request = resolve(digits, fraction=0.1)
    settings = MLLMConfig(backend="clip", model="some", images_per_class=1000)
    asked = questions(digits, request, settings)
    assert len(asked) == 10
    assert max(i for question in asked for i in question.positions) < len(digits.train)

    class Knows(torch.nn.Module):
        """Right on training images, and on no other."""

        def __init__(self) -> None:
            super().__init__()
            self.unseen = next(digits.held_out.batches([torch.arange(digits.borrowed)])).flatten(1)
            self.seen = next(digits.train.batches([torch.arange(len(digits.train))])).flatten(1)

        def forward(self, x: Tensor) -> Tensor:
            assert torch.cdist(x.flatten(1), self.unseen).min() > 0
            near = digits.train.labels[torch.cdist(x.flatten(1), self.seen).argmin(1)]
            return torch.nn.functional.one_hot(near, 10).float()

    told = check(Knows().eval(), digits.train, digits.classes)
    assert told.startswith("100.0% of 500 training images")


def test_the_user_is_told_what_leaves_the_test(tmp_path):
    mine = RunContext.open(load_config(write_config(tmp_path, model={"checkpoint": "mine.pth"})))
    assert f"{mine.inputs.data.borrowed} of 325 test images are held out for validation" in mine.inputs.notes[-1]
    assert RunContext.open(load_config(write_config(tmp_path))).inputs.notes == []


@pytest.mark.parametrize(("source", "said"), [("train", True), ("test", False)])
def test_labels_say_when_the_model_may_know_what_is_held_out(megu, finished, source, said):
    folder = finished.parent
    torch.save(load_file(folder / "run" / "original.safetensors"), folder / "mine.pth")
    settings = [f"model.checkpoint={folder / 'mine.pth'}", f"data.validation_from={source}",
                "forget={random: {count: 20}}", "eval.oracle=false"]  # fmt: skip
    given = ("-c", finished, "-o", folder / "again", *(w for s in settings for w in ("--set", s)))
    assert megu("similarity", *given).code == 0
    answer = megu("labels", *given)
    assert answer.code == 0, answer.err
    assert ("of their labels, as much as the model gives" in " ".join(answer.err.split())) == said
