"""`megu check-data`: forgotten images are found when they come back, and others are not."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_config
from PIL import Image

from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.record import fingerprints, returned

FASHION = Path("/usr/share/datasets/fashion-mnist")


def draw(path: Path, seed: int, kind: int) -> None:
    """A picture of a few soft spots, unlike that of any other seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    coarse[:, :, kind] //= 4
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(path)


def photos(folder: Path) -> None:
    for kind, name in enumerate(("night", "meadow", "street")):
        for i in range(24):
            split = "train" if i < 18 else "test"
            draw(folder / split / name / f"{name}{i}.png", 100 * kind + i, kind)


@pytest.fixture(scope="module")
def forgotten_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that forgets four photos, one of which has a copy; not to be changed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("photos")
    photos(folder / "photos")
    shutil.copy2(folder / "photos/train/night/night3.png", folder / "photos/train/night/twin.png")
    (folder / "delete.csv").write_text("path\n" + "".join(f"train/night/night{i}.png\n" for i in (3, 4, 5, 6)))
    (folder / "ratings.json").write_text(
        '{"rater": "test", "classes": ["meadow", "night", "street"], "scores": {"night": {"meadow": 3, "street": 4}}}'
    )
    file = write_config(
        folder,
        data={"name": "imagefolder", "root": "photos", "image_size": 16, "limit": None},
        forget={"samples": "delete.csv"},
        mllm={"backend": "recorded", "ratings": "ratings.json"},
        record={"fingerprints": "lookalikes"},
    )
    pipeline = Pipeline(RunContext.open(load_config(file)))
    pipeline.context.directory.out.mkdir()
    pipeline.run(goals=["finetune"])
    fingerprints.keep(pipeline.context)
    return folder


@pytest.fixture
def forgotten(forgotten_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(forgotten_folder, tmp_path / "work")
    return tmp_path / "work"


def come_back(forgotten: Path, folder: Path) -> None:
    """A new delivery: a byte copy by another name, a resized JPEG, images that stay, and a file that is no image."""
    photos = forgotten / "photos" / "train"
    (folder / "deep").mkdir(parents=True)
    shutil.copy2(photos / "night/night3.png", folder / "deep" / "a.dat")
    with Image.open(photos / "night/night4.png") as image:
        image.convert("RGB").resize((53, 40)).save(folder / "b.jpg", quality=60)
    shutil.copytree(photos / "meadow", folder / "meadow")
    (folder / "broken.png").write_bytes(b"no image")


def test_images_that_came_back_are_found_and_others_are_not(megu, forgotten, tmp_path):
    come_back(forgotten, tmp_path / "new")
    # The run directory is all that it needs: the data are gone.
    shutil.rmtree(forgotten / "photos")
    answer = megu("check-data", tmp_path / "new", "-o", forgotten / "run", "--json", "-q")
    assert answer.code == 3
    assert set(answer.json["found"]) == {"deep/a.dat", "b.jpg"}
    assert answer.json["found"]["deep/a.dat"] == "the same bytes"
    assert answer.json["found"]["b.jpg"].startswith("looks alike")
    assert answer.json["undecodable"] == ["broken.png"]
    assert answer.json["not_checked"] == []
    assert "2 of 21 files" in answer.err
    clean = megu("check-data", tmp_path / "new" / "meadow", "-o", forgotten / "run")
    assert clean.code == 0
    assert "0 of 18 files hold forgotten images" in clean.out


def test_a_record_is_enough_and_byte_copies_need_its_salt(megu, forgotten, tmp_path):
    come_back(forgotten, tmp_path / "new")
    record = tmp_path / "record.json"
    made = megu("record", "-c", forgotten / "megu.yaml", "--request", "R1", "--to", record)
    assert made.code == 0, made.err
    answer = megu("check-data", tmp_path / "new", "--record", record, "--json", "-q")
    assert answer.code == 3
    assert all(how.startswith("looks alike") for how in answer.json["found"].values())
    assert "name the salt with --salt" in answer.json["not_checked"][0]
    answer = megu("check-data", tmp_path / "new", "--record", record, "--salt", forgotten / "run/record.salt", "--json")
    assert answer.json["found"]["deep/a.dat"] == "the same bytes"


@pytest.mark.parametrize("kind", ["bytes", "none"])
def test_without_lookalikes_byte_copies_are_found_and_the_rest_is_told(megu, forgotten, tmp_path, kind):
    config = load_config(forgotten / "megu.yaml", [f"record.fingerprints={kind}"])
    fingerprints.keep(RunContext.open(config))
    come_back(forgotten, tmp_path / "new")
    answer = megu("check-data", tmp_path / "new", "-o", forgotten / "run", "--json", "-q")
    # With none, finetune.json still tells single images, so that a later request keeps them forgotten.
    assert answer.json["found"] == {"deep/a.dat": "the same bytes"}
    assert "re-encoded copies are not looked for" in answer.json["not_checked"][0]


def test_an_added_copy_is_counted_and_told(forgotten):
    body = fingerprints.read(forgotten / "run")
    assert (body["images"], body["copies"]) == (5, 1)
    assert len(body["fingerprints"]["images"]) == 5
    # A copy has the same look.
    assert len(body["fingerprints"]["lookalikes"]) == 4


def test_images_of_one_colour_look_like_nothing(tmp_path):
    assert fingerprints.look(Image.new("RGB", (40, 40), "navy")) is None
    draw(tmp_path / "a.png", 0, 0)
    with Image.open(tmp_path / "a.png") as image:
        assert fingerprints.look(image) is not None


def test_images_of_a_data_set_without_files_are_found_by_their_pixels(megu, finished, tmp_path):
    work = RunContext.open(load_config(finished))
    fingerprints.keep(work)
    image = Image.fromarray(work.inputs.data.train.images[int(work.inputs.request.forget[0])][0].numpy())
    (tmp_path / "new").mkdir()
    image.save(tmp_path / "new" / "eight.png")
    Image.fromarray(work.inputs.data.train.images[int(work.inputs.request.retain[0])][0].numpy()).save(
        tmp_path / "new" / "other.png"
    )
    answer = megu("check-data", tmp_path / "new", "-c", finished, "--json", "-q")
    assert answer.json["found"] == {"eight.png": "the same pixels"}


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="needs the package dataset-fashion-mnist")
def test_copies_of_fashion_mnist_are_found_with_one_false_alarm_in_10000_at_most(tmp_path):
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:10_100]
    images = [Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in pixels]
    own, contents = images[:100], []
    for i, image in enumerate(own):
        image.save(tmp_path / f"{i}.png")
        contents.append((tmp_path / f"{i}.png").read_bytes())
    looks = np.stack([np.frombuffer(bytes.fromhex(fingerprints.look(image)), np.uint8) for image in own])
    known = returned.Known(frozenset(map(fingerprints.bytes_digest, contents)), looks=looks)
    found = returned.search(tmp_path, known).found
    assert [one.how for one in found] == ["the same bytes"] * 100
    copies = 0
    for i, image in enumerate(own):
        path = tmp_path / "copy.jpg"
        image.resize(((32, 32), (48, 48), (64, 64), (128, 128))[i % 4]).save(path, quality=(50, 75, 90)[i % 3])
        with Image.open(path) as copy:
            copies += bool(returned.alike(copy, known))
    assert copies >= 95
    assert sum(bool(returned.alike(image, known)) for image in images[100:]) <= 1
