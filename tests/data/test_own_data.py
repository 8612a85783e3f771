"""Data of one's own: folders, manifests, saved data sets; odd images; paths that would lead out."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_set, write_config
from PIL import Image

from megu_cli import data
from megu_cli.config import load_config
from megu_cli.data.decode import Decode, Resizing
from megu_cli.data.names import Names, hashed
from megu_cli.data.own import ordered
from megu_cli.errors import DataError
from megu_cli.pipeline.context import RunContext
from megu_cli.run.file_digests import FileDigestCache


def picture(path: Path, seed: int = 0, side: int = 12) -> Path:
    """A random picture; equal seeds give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def single(root: Path, classes=("cat", "dog", "eel"), number: int = 10) -> Path:
    """A single folder of class folders."""
    for i, name in enumerate(classes):
        for k in range(number):
            picture(root / name / f"{k}.png", 100 * i + k)
    return root


def load(root: Path | None = None, name: str = "imagefolder", **settings) -> data.Dataset:
    return data_set(name, root=root, **{"image_size": 8, **settings})


def table(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def refused(*parts: str):
    return pytest.raises(DataError, match=".*".join(parts)) if len(parts) == 1 else _all(parts)


class _all:  # noqa: N801 - a context, read as a word
    def __init__(self, parts: tuple[str, ...]) -> None:
        self.parts = parts

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> bool:
        assert isinstance(error, DataError), error
        for part in self.parts:
            assert part in str(error), str(error)
        return True


# -- layouts -------------------------------------------------------------------------------------------------------


def test_a_single_folder_gets_a_test_split_by_hash_of_the_path(tmp_path):
    made = load(single(tmp_path, number=40))
    assert made.classes == ["cat", "dog", "eel"]
    assert len(made.train) + len(made.test) == 120
    assert 10 < len(made.test) < 40
    assert set(made.test.names).isdisjoint(made.train.names)
    before = list(made.test.names)
    picture(tmp_path / "cat" / "new.png", 999)
    assert [name for name in load(tmp_path).test.names if "new" not in name] == before
    assert len(load(tmp_path, test_fraction=0.5).test) > len(made.test)


def test_what_a_request_names_is_never_a_test_image(tmp_path):
    single(tmp_path)
    taken = load(tmp_path).test.names[0]
    spared = load(tmp_path, reserved=data.Reserved(names=frozenset([taken])))
    assert taken in list(spared.train.names)
    content = int(load(tmp_path).test.images.contents()[0])
    spared = load(tmp_path, reserved=data.Reserved(contents=frozenset([content])))
    assert taken in list(spared.train.names)


def test_val_serves_as_test_and_train_alone_is_no_layout(tmp_path):
    for split in ("train", "val"):
        single(tmp_path / "a" / split, number=3)
    assert load(tmp_path / "a").test.names[0] == "val/cat/0.png"
    assert not load(tmp_path / "a").test_made
    single(tmp_path / "b" / "train")
    with refused("has train/ but no test/", "set data.root to train/ itself"):
        load(tmp_path / "b")
    # A class may be called train.
    single(tmp_path / "c", ("train", "ship"))
    assert load(tmp_path / "c").classes == ["ship", "train"]


def test_the_order_of_classes_is_torchvisions_or_as_given(tmp_path):
    from torchvision.datasets import ImageFolder

    single(tmp_path, ("10", "9", "Zebra", "apple"), number=4)
    theirs = ImageFolder(tmp_path)
    mine = load(tmp_path)
    assert mine.classes == theirs.classes
    by_name = {Path(path).relative_to(tmp_path).as_posix(): label for path, label in theirs.samples}
    assert all(by_name[n] == label for n, label in zip(mine.train.names, mine.train.labels.tolist(), strict=True))
    order = ["apple", "Zebra", "never seen", "9", "10"]
    given = load(tmp_path, order=order)
    assert given.classes == order
    with refused("the label '9' is not among model.classes"):
        load(tmp_path, order=["apple", "Zebra", "10"])
    with refused("names 'apple' twice"):
        load(tmp_path, order=["apple", "apple"])


def test_a_made_test_split_is_said_of_a_model_that_may_have_seen_it(tmp_path):
    single(tmp_path / "photos")
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None},
        model={"name": "small_cnn", "checkpoint": "mine.pth"},
        forget={"classes": ["cat"]},
    )
    assert not any("the test split" in line for line in RunContext.open(load_config(file)).inputs.notes)
    (tmp_path / "mine.pth").write_bytes(b"")
    assert any("the test split was made here" in line for line in RunContext.open(load_config(file)).inputs.notes)


def test_the_models_classes_may_lack_images(tmp_path):
    single(tmp_path / "photos", ("cat", "dog", "eel"), number=4)
    order = ["eel", "never seen", "dog", "cat"]
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None},
        model={"name": "small_cnn", "classes": order},
        forget={"classes": ["cat"]},
    )
    work = RunContext.open(load_config(file))
    assert work.inputs.data.classes == work.inputs.data.concepts == order
    assert sorted(set(work.inputs.data.train.labels.tolist())) == [0, 2, 3]
    assert [work.inputs.data.train.names[i][:3] for i in work.inputs.request.forget] == ["cat"] * len(
        work.inputs.request.forget
    )
    # Of a coarse-labelled set the model's outputs are the superclasses.
    coarse = {"pet": ["cat", "dog"], "fish": ["eel"], "wild": []}
    settings = [f"data.superclasses={json.dumps(coarse)}", "model.classes=[fish, wild, pet]", "forget.subclasses=[cat]"]
    work = RunContext.open(load_config(file, settings))
    assert work.inputs.data.classes == ["fish", "wild", "pet"]
    assert [work.inputs.data.concepts[c] for c in work.inputs.request.concepts] == ["cat"]


def test_a_manifest(tmp_path):
    single(tmp_path / "images")
    lines = ["Path,LABEL,split,note"]
    lines += [f"./{c}/{k}.png, {c} ,{'test' if k > 7 else 'Train'},x" for c in ("eel", "cat", "dog") for k in range(10)]
    read = load(tmp_path / "images", "manifest", manifest=table(tmp_path / "lists" / "m.csv", *lines))
    assert read.classes == ["cat", "dog", "eel"]
    assert (len(read.train), len(read.test)) == (24, 6)
    assert read.train.names[0] == "eel/0.png"
    assert read.train.labels[0] == 2
    folder = load(tmp_path / "images", reserved=data.Reserved(names=frozenset(["eel/0.png"])))
    at = list(folder.train.names).index("eel/0.png")
    order = [torch.tensor([0])]
    assert torch.equal(next(read.train.batches(order)), next(folder.train.batches([torch.tensor([at])])))
    # Without data.root, paths are relative to the manifest.
    beside = load(None, "manifest", manifest=table(tmp_path / "images" / "m.csv", *lines))
    assert list(beside.train.names) == list(read.train.names)


def test_one_person_is_on_one_side_only(tmp_path):
    single(tmp_path, number=30)
    names = [f"{c}/{k}.png" for c in ("cat", "dog", "eel") for k in range(30)]
    lines = [f"{name},{name[:3]},p{i % 30}" for i, name in enumerate(names)]
    file = table(tmp_path / "m.csv", "path,label,subject", *lines)
    read = load(None, "manifest", manifest=file, validation=0.3)
    sides = [set(split.subjects.tolist()) for split in (read.train, read.test)]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0]
    assert sides[1]
    held, kept = (set(read.train.subjects[mask].tolist()) for mask in (~read.trainable, read.trainable))
    assert held
    assert held.isdisjoint(kept)
    person = read.subjects[int(read.test.subjects[0])]
    spared = load(None, "manifest", manifest=file, reserved=data.Reserved(subjects=frozenset([person])))
    assert spared.subjects.index(person) not in spared.test.subjects.tolist()


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i}.png", i)
    lines = [f"{i}.png,{i % 11},{'test' if i == 11 else 'train'}" for i in range(12)]
    read = load(None, "manifest", manifest=table(tmp_path / "m.csv", "path,label,split", *lines))
    assert read.classes == [str(i) for i in range(11)]
    assert read.train.labels.tolist() == list(range(11))


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (["file,label", "a.png,x"], ["has no column path", "file, label"]),
        (["path,label"], ["names no images"]),
        (["path,label", "cat/0.png,"], ["line 2", "has no label"]),
        (["path,label", "cat/0.png,a", "./cat/0.png,b"], ["line 3: cat/0.png stands in line 2 already"]),
        (["path,label,split", "cat/0.png,a,dev"], ["line 2", "'dev', neither train nor test"]),
        (["path,label", "cat/77.png,a"], ["cat/77.png is not there"]),
        (["path,label", "cat,a"], ["cat is no regular file"]),
        (["path,label", ",a"], ["line 2: the path is empty"]),
        (["path,label", *[f"cat/{i},a" for i in range(90, 97)]], ["7 files cannot be used", "cat/94", "and 2 more"]),
        (["path,label,split", "cat/0.png,a,train"], ["leaves no test images"]),
        (
            ["path,label", "cat/0.png,A b", "cat/1.png,a  B"],
            ["differ in case, spaces or Unicode form", "model.classes"],
        ),
        (["path,label", "cat/0.png,e\u0301", "cat/1.png,\u00e9"], ["Unicode form"]),
    ],
)
def test_manifests_at_fault(tmp_path, lines, parts):
    single(tmp_path)
    with refused(*parts):
        load(None, "manifest", manifest=table(tmp_path / "m.csv", *lines))


def test_a_manifest_that_is_none(tmp_path):
    with refused("no.csv cannot be read"):
        load(None, "manifest", manifest=tmp_path / "no.csv")
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    with refused("m.csv cannot be read"):
        load(None, "manifest", manifest=tmp_path / "m.csv")


NAMES = ["a b", "vehicle/car", "\U0001f980 crab", "e\u0301clair", 'quote"d, and more', "8", "-1", "null"]


def test_odd_class_names_in_a_manifest(tmp_path):
    for i in range(2 * len(NAMES)):
        picture(tmp_path / f"{i}.png", i)
    quoted = ['"' + name.replace('"', '""') + '"' for name in NAMES]
    lines = [f"{i}.png,{quoted[i // 2]},{'test' if i % 2 else 'train'}" for i in range(2 * len(NAMES))]
    read = load(None, "manifest", manifest=table(tmp_path / "m.csv", "path,label,split", *lines))
    assert read.classes == sorted(NAMES)
    from megu_cli.request.resolve import resolve

    for name in NAMES:
        assert resolve(read, classes=[name]).classes == [read.classes.index(name)]
    # Composed as most systems write it, it is the same name.
    assert resolve(read, classes=["\u00e9clair"]).classes == [read.classes.index("e\u0301clair")]


def test_labels_that_look_alike_are_two_classes_only_if_given_so():
    with refused("'Cat' and 'cat'"):
        ordered(["Cat", "cat"], None)
    assert ordered(["Cat", "cat"], ["cat", "Cat"])[0] == ["cat", "Cat"]


def test_the_order_of_twelve_thousand_classes():
    import time

    labels = [f"class {i}" for i in range(12_000)]
    started = time.perf_counter()
    classes, position = ordered(labels, None)
    again, _ = ordered(labels, list(reversed(labels)))
    assert len(classes) == len(again) == 12_000
    assert position["class 11999"] == classes.index("class 11999")
    assert time.perf_counter() - started < 1


def test_a_request_among_twelve_thousand_classes():
    from megu_cli.request.resolve import resolve

    names = [f"class {i}" for i in range(12_000)]
    every = torch.arange(12_000).repeat(2)
    pixels = data.MemoryImages(torch.zeros(24_000, 1, 1, 1, dtype=torch.uint8))
    mean = torch.zeros(1, 1, 1)
    split = data.Split(pixels, every, every, [str(i) for i in range(24_000)], mean, mean + 1, "x")
    none = torch.empty(0, dtype=torch.int64)
    large = data.Dataset("x", names, names, torch.arange(12_000), split, split.view(none), split, none)
    request = resolve(large, classes=names[:6000])
    assert len(request.forget) == 12_000
    assert request.classes == list(range(6000))


# -- saved data sets -----------------------------------------------------------------------------------------------


def hub(folder: Path, splits: dict[str, int], subjects: bool = False) -> Path:
    """A small data set as `save_to_disk` writes it."""
    import datasets

    def rows(number: int, start: int) -> datasets.Dataset:
        content = {
            "picture": [Image.open(picture(folder / "src" / f"{start + i}.png", start + i)) for i in range(number)],
            "kind": [i % 3 for i in range(number)],
            **({"subject": [f"p{i // 2}" for i in range(number)]} if subjects else {}),
        }
        features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["zoo", "cat", "ant"])}
        if subjects:
            features["subject"] = datasets.Value("string")
        return datasets.Dataset.from_dict(content, features=datasets.Features(features))

    parts = {name: rows(number, 100 * i) for i, (name, number) in enumerate(splits.items())}
    whole = datasets.DatasetDict(parts) if len(parts) > 1 else next(iter(parts.values()))
    whole.save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.slow  # the import of datasets takes seconds
def test_a_saved_hugging_face_data_set(tmp_path):
    saved = load(hub(tmp_path, {"train": 9, "test": 6}), "hf_dataset")
    assert saved.classes == ["zoo", "cat", "ant"]
    assert (len(saved.train), len(saved.test)) == (9, 6)
    assert saved.train.labels.tolist() == [0, 1, 2] * 3
    expected = Decode(Resizing(8), 3)("x", (tmp_path / "src" / "4.png").read_bytes())
    assert torch.equal(saved.train.images[4], expected)
    streamed = load(tmp_path / "saved", "hf_dataset", memory_limit=1e-9, workers=1)
    order = [torch.tensor([8, 0]), torch.tensor([4])]
    for a, b in zip(saved.train.batches(order), streamed.train.batches(order), strict=True):
        assert torch.equal(a, b)
    assert load(tmp_path / "saved", "hf_dataset").train.digest == saved.train.digest


@pytest.mark.slow  # the import of datasets takes seconds
def test_a_saved_data_set_without_a_test_split(tmp_path):
    made = load(hub(tmp_path, {"train": 40}, subjects=True), "hf_dataset")
    assert len(made.train) + len(made.test) == 40
    assert set(made.train.subjects.tolist()).isdisjoint(made.test.subjects.tolist())


@pytest.mark.slow  # the import of datasets takes seconds
def test_saved_data_sets_at_fault(tmp_path):
    import datasets

    with refused("is no data set of Hugging Face's save_to_disk"):
        load(single(tmp_path / "folder"), "hf_dataset")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
    with refused("0 columns of images", "text (Value)"):
        load(tmp_path / "text", "hf_dataset")
    # -1 is how a published test split keeps its labels to itself.
    kept = datasets.load_from_disk(str(hub(tmp_path / "kept", {"train": 9, "test": 6})))
    secret = kept["test"].map(lambda row: {"kind": -1})
    datasets.DatasetDict({"train": kept["train"], "test": secret}).save_to_disk(str(tmp_path / "secret"))
    with refused("6 rows", "have no label", "row 9: kind is -1"):
        load(tmp_path / "secret", "hf_dataset")
    # A table can name files instead of holding them: those must lie in the root too.
    outside = picture(tmp_path / "outside.png")
    named = {"image": [{"bytes": None, "path": str(outside)}] * 3, "label": [0, 1, 0]}
    kinds = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                               "label": datasets.Value("int64")})  # fmt: skip
    rows = datasets.Dataset.from_dict(named, features=kinds)
    rows.cast_column("image", datasets.Image(decode=False)).save_to_disk(str(tmp_path / "names"))
    saved = (tmp_path / "names").iterdir()
    if not any(outside.read_bytes() in path.read_bytes() for path in saved):  # some versions embed the file instead
        with refused("is absolute"):
            load(tmp_path / "names", "hf_dataset")


def test_the_package_datasets_is_asked_for(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("needs the package datasets", "megu-cli[datasets]"):
        load(tmp_path, "hf_dataset")


# -- odd images ----------------------------------------------------------------------------------------------------


def decoded(image: Image.Image, form: str = "PNG", channels: int = 3, size: int = 4, **options) -> torch.Tensor:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Decode(Resizing(size), channels)("x", buffer.getvalue())


def test_exif_orientation_is_followed():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 200  # bright above
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decoded(image, "JPEG", exif=exif, quality=95)
    assert turned[:, :2].float().mean() < 20
    assert turned[:, 2:].float().mean() > 180


def test_grey_images_and_grey_models():
    grey = Image.fromarray(np.full((6, 6), 77, np.uint8))
    assert decoded(grey).unique().tolist() == [77]
    assert decoded(grey, channels=1).shape == (1, 4, 4)
    colour = Image.fromarray(np.full((6, 6, 3), (255, 0, 0), np.uint8))
    assert decoded(colour, channels=1).unique().tolist() == [76]  # ITU-R 601
    assert decoded(Image.new("1", (6, 6), 1)).unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode):
    image = Image.new("RGBA", (6, 6), (10, 20, 30, 0))
    if mode == "LA":
        image = Image.new("LA", (6, 6), (10, 0))
    elif mode == "P":
        image = Image.new("P", (6, 6), 0)
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.info["transparency"] = 0
    options = {"transparency": 0} if mode == "P" else {}
    assert decoded(image, **options).unique().tolist() == [255]
    half = Image.new("RGBA", (6, 6), (0, 0, 0, 127))
    assert 125 <= decoded(half).float().mean() <= 131


def test_palettes_without_transparency():
    image = Image.new("P", (6, 6), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decoded(image)[:, 0, 0].tolist() == [40, 50, 60]


def test_sixteen_bits_are_scaled():
    ramp = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        assert decoded(Image.fromarray(ramp), form, 1, 2)[0].tolist() == [[0, 100], [200, 255]]


def test_sixteen_bits_and_a_transparent_value():
    ramp = np.array([[0, 257 * 100], [257 * 200, 32768]], np.uint16)
    assert decoded(Image.fromarray(ramp), "PNG", 1, 2, transparency=257 * 100)[0].tolist() == [[0, 255], [200, 127]]


def test_pixels_without_a_known_range_are_refused():
    with refused("no fixed range"):
        decoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with refused("no fixed range"):
        decoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")


def test_cmyk():
    red = decoded(Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "JPEG", quality=95)[:, 0, 0]
    assert red[0] > 200
    assert red[1:].max() < 60


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_picture_of_several(form):
    first, second = (Image.new("RGB", (6, 6), colour) for colour in ("black", "white"))
    options = {"lossless": True} if form == "WEBP" else {}
    assert decoded(first, form, save_all=True, append_images=[second], **options).max() == 0


def test_a_wrong_suffix_does_not_matter_and_junk_does_not_count(tmp_path):
    single(tmp_path, number=6)
    Image.open(tmp_path / "cat" / "0.png").save(tmp_path / "cat" / "x.jpg", "PNG")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt", ".hidden.jpg"):
        (tmp_path / "cat" / name).write_bytes(b"junk")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "readme.md").write_text("x")
    read = load(tmp_path)
    assert read.classes == ["cat", "dog", "eel"]
    assert len(read.train) + len(read.test) == 19
    assert "cat/x.jpg" in [*read.train.names, *read.test.names]


def jpeg(path: Path, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    return path


def bomb() -> bytes:
    """A PNG that says it has ten billion pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        ("empty.png", lambda raw: b"", "it is empty"),
        ("empty.jpg", lambda raw: b"", "it is empty"),
        ("text.jpg", lambda raw: b"<html>404</html>", "no image of a known format"),
        (
            "eps.png",
            lambda raw: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "no image of a known",
        ),
        ("cut.jpg", lambda raw: raw[: len(raw) // 2], "cut short"),
        ("cut.png", lambda raw: raw[: len(raw) // 2], "cannot be decoded"),
        ("flipped.png", lambda raw: raw[:60] + bytes([raw[60] ^ 255]) + raw[61:], "cannot be decoded"),
        ("header.webp", lambda raw: raw[:20], "cannot be decoded"),
        ("bomb.png", lambda raw: bomb(), "cannot be decoded"),
    ],
)
def test_damaged_files_are_named_before_anything_is_computed(tmp_path, name, damage, part):
    single(tmp_path)
    path = tmp_path / "dog" / name
    form = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, form)
    path.write_bytes(damage(path.read_bytes()))
    with refused(str(path), part, "Repair them or take them out of the data."):
        load(tmp_path)


def test_five_faulty_files_are_named_and_the_rest_counted(tmp_path):
    single(tmp_path)
    for i in range(7):
        (tmp_path / "dog" / f"bad{i}.png").write_bytes(b"")
    with refused("7 files cannot be used", "bad0.png", "bad4.png", "and 2 more"):
        load(tmp_path)


@pytest.mark.parametrize("memory_limit", [2.0, 1e-9])
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_inside_a_file_shows_when_it_is_decoded(tmp_path, memory_limit, workers):
    single(tmp_path)
    for name in ("a.bmp", "b.bmp"):  # a format without checksums or an end marker
        path = tmp_path / "dog" / name
        Image.new("RGB", (30, 30)).save(path)
        path.write_bytes(path.read_bytes()[:500])
    named = data.Reserved(names=frozenset(["dog/a.bmp", "dog/b.bmp"]))
    read = load(tmp_path, memory_limit=memory_limit, workers=workers, reserved=named)
    order = list(torch.arange(len(read.train)).split(16))
    with refused("2 files cannot be decoded", "dog/a.bmp", "dog/b.bmp", "truncated"):
        list(read.train.batches(order))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    single(tmp_path)
    secret = str(tmp_path / "dog" / "3.png")
    read = Path.read_bytes

    def guarded(path: Path) -> bytes:
        # Root may read everything, and tests may run as root.
        if str(path) == secret:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    with refused(secret, "cannot be read: Permission denied"):
        load(tmp_path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    single(tmp_path)
    os.mkfifo(tmp_path / "dog" / "pipe.png")  # opening it would wait for ever
    with refused("pipe.png is no regular file"):
        load(tmp_path)


def test_an_empty_class_folder(tmp_path):
    single(tmp_path)
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "photo.heic").write_bytes(b"x")
    with refused("fox holds no images", "list all of them in model.classes"):
        load(tmp_path)
    assert load(tmp_path, order=["cat", "dog", "eel", "fox"]).classes[3] == "fox"


def test_a_name_that_is_not_utf_8(tmp_path):
    single(tmp_path)
    (tmp_path / "dog" / "0.png").rename(tmp_path / "dog" / os.fsdecode(b"\xff.png"))
    with refused("dog/\ufffd.png: the name is not UTF-8"):
        load(tmp_path)


# -- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("../secret.png", "climbs out with .."),
        ("cat/../../secret.png", "climbs out with .."),
        ("cat\\..\\..\\secret.png", "climbs out with .."),
        ("{secret}", "is absolute"),
        ("~/secret.png", "is absolute"),
        ("C:\\secret.png", "is absolute"),
        ("link.png", "leads out of"),
        ("linked/secret.png", "leads out of"),
    ],
)
def test_no_line_of_a_manifest_leads_out_of_the_root(tmp_path, path, part):
    root = single(tmp_path / "images")
    secret = picture(tmp_path / "secret.png")
    (root / "link.png").symlink_to(secret)
    (root / "linked").symlink_to(tmp_path)
    file = table(tmp_path / "m.csv", "path,label", "cat/0.png,a", f"{path.format(secret=secret)},b")
    with refused("line 3: ", part):
        load(root, "manifest", manifest=file)


@pytest.mark.parametrize("kind", ["file", "folder", "class", "dangling"])
def test_no_link_in_a_folder_leads_out_of_the_root(tmp_path, kind):
    root = single(tmp_path / "images")
    outside = single(tmp_path / "other")
    link, target = {
        "file": (root / "cat" / "x.png", outside / "cat" / "0.png"),
        "folder": (root / "cat" / "more", outside / "cat"),
        "class": (root / "fox", outside / "cat"),
        "dangling": (root / "cat" / "x.png", tmp_path / "nowhere.png"),
    }[kind]
    link.symlink_to(target)
    with refused("leads out of", str(target), "data.follow_links"):
        load(root)
    if kind == "dangling":
        with refused("x.png is not there"):
            load(root, follow_links=True)
    else:
        read = load(root, follow_links=True)
        assert len(read.train) + len(read.test) == {"file": 31}.get(kind, 40)


def test_links_within_the_root_and_a_root_that_is_a_link(tmp_path):
    root = single(tmp_path / "images")
    (root / "cat" / "again.png").symlink_to(root / "dog" / "0.png")
    (tmp_path / "alias").symlink_to(root)
    read = load(tmp_path / "alias")
    assert len(read.train) + len(read.test) == 31
    (root / "dog" / "round").symlink_to(root / "dog")
    with refused("leads back to a folder it lies in"):
        load(root)
    with refused("leads back"):
        load(root, follow_links=True)


# -- streaming -----------------------------------------------------------------------------------------------------


def test_workers_give_the_same_pixels_and_draw_nothing(tmp_path):
    single(tmp_path)
    order = [torch.tensor([5, 0, 7]), torch.tensor([2])]
    alone = load(tmp_path, memory_limit=1e-9)
    torch.manual_seed(3)
    expected = list(alone.train.batches(order))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    found = list(load(tmp_path, memory_limit=1e-9, workers=2).train.batches(order))
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # Where workers are started afresh, as on macOS, the images travel to them.
    again = pickle.loads(pickle.dumps(alone.train.images))
    assert torch.equal(again[3], alone.train.images[3])


def test_names_are_packed():
    names = ["a", "", "é/ü.png", "\U0001f980"]
    packed = Names.of(names)
    assert list(packed) == names == [packed[i] for i in range(4)]
    assert packed[-1] == names[-1]
    assert list(packed[1:3]) == names[1:3]
    assert list(packed.at(np.array([3, 0]))) == [names[3], names[0]]
    with pytest.raises(IndexError):
        packed[4]
    with pytest.raises(IndexError):
        Names.of([])[0]
    assert hashed(packed, "x").tolist() == hashed(names, "x").tolist()


def test_the_memo_reads_a_file_once_and_again_when_it_changed(tmp_path):
    single(tmp_path / "images")
    paths = sorted(str(p) for p in (tmp_path / "images").rglob("*.png"))
    seen: list[str] = []
    memo = FileDigestCache(tmp_path / "memo.npy")
    first = memo.digests(paths, lambda path, content: seen.append(path))
    assert seen == paths
    memo.keep()
    assert b"cat" not in (tmp_path / "memo.npy").read_bytes()
    seen.clear()
    assert np.array_equal(
        FileDigestCache(tmp_path / "memo.npy").digests(paths, lambda path, content: seen.append(path)), first
    )
    assert seen == []
    picture(Path(paths[4]), 77, side=20)
    memo = FileDigestCache(tmp_path / "memo.npy")
    changed = memo.digests(paths, lambda path, content: seen.append(path))
    assert seen == [paths[4]]
    assert np.flatnonzero((changed != first).any(1)).tolist() == [4]
    (tmp_path / "memo.npy").write_bytes(b"damaged")
    assert np.array_equal(FileDigestCache(tmp_path / "memo.npy").digests(paths), changed)


def test_a_memo_with_any_fault_is_dropped_and_no_wrong_digest_is_recalled(tmp_path):
    single(tmp_path / "images")
    paths = sorted(str(p) for p in (tmp_path / "images").rglob("*.png"))
    file = tmp_path / "memo.npy"
    memo = FileDigestCache(file)
    right = memo.digests(paths)
    memo.keep()
    whole = file.read_bytes()
    assert len(np.load(file, allow_pickle=False)) == len(paths) + 1  # numpy reads it
    odd = [bytes([*whole[:i], whole[i] ^ 1, *whole[i + 1 :]]) for i in range(0, len(whole), 7)]
    odd += [whole[:length] for length in (0, 7, 100, len(whole) - 48, len(whole) - 1)] + [whole + bytes(48)]
    huge = whole.replace(f"({len(paths) + 1},)".encode(), b"(99999999999999,)", 1)
    odd += [huge, whole.replace(b"<u8", b"|O8", 1)]
    for content in odd:
        file.write_bytes(content)
        seen: list[str] = []
        assert np.array_equal(
            FileDigestCache(file).digests(paths, lambda path, content, seen=seen: seen.append(path)), right
        )
        assert seen == paths
    for save, table in ((np.savez, np.zeros(3)), (np.save, np.zeros((2, 2))), (np.save, np.array([{}], object))):
        with file.open("wb") as stream:
            save(stream, table)
        assert np.array_equal(FileDigestCache(file).digests(paths), right)
    file.unlink()
    file.mkdir()
    assert np.array_equal(FileDigestCache(file).digests(paths), right)


def test_an_image_replaced_at_equal_size_and_time_is_read_again(tmp_path):
    file = tmp_path / "image"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    memo = FileDigestCache(tmp_path / "memo.npy")
    first = memo.digests([str(file)])
    memo.keep()
    time.sleep(0.05)  # the clock of the file system may be coarse
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert not np.array_equal(FileDigestCache(tmp_path / "memo.npy").digests([str(file)]), first)


def test_a_renewed_memo_reads_every_file_and_replaces_what_it_remembered(tmp_path):
    file = tmp_path / "image"
    file.write_bytes(b"one")
    memo = FileDigestCache(tmp_path / "memo.npy")
    memo.digests([str(file)])
    memo.keep()
    seen: list[str] = []
    memo = FileDigestCache(tmp_path / "memo.npy")
    memo.renew()
    memo.digests([str(file)], lambda path, content: seen.append(path))
    memo.keep()
    assert seen == [str(file)]
    assert len(np.load(tmp_path / "memo.npy")) == 2
