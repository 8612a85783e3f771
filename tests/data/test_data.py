"""Data sets, from small files in the real formats."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import data_set, process, write_folder
from PIL import Image

from megu_cli import data
from megu_cli.errors import DataError


def write_idx(folder: Path, train: int = 30, test: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, number in (("train", train), ("t10k", test)):
        pixels = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = (np.arange(number) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, number, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">II", 0x801, number) + labels.tobytes())
        )


def write_cifar(folder: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny files in CIFAR's own format, with their checksums told to torchvision's reader."""
    import hashlib

    base = folder / kind.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key = "fine_labels" if kind is torchvision.datasets.CIFAR100 else "labels"
    classes = 100 if key == "fine_labels" else 10

    def put(name: str, content: object) -> list[str]:
        raw = pickle.dumps(content)
        (base / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(number: int) -> dict:
        return {"data": rng.integers(0, 256, (number, 3072), dtype=np.uint8), key: [i % classes for i in range(number)]}

    monkeypatch.setattr(kind, "train_list", [put(name, batch(classes)) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [put(name, batch(classes)) for name, _ in kind.test_list])
    names = (
        [c for members in data.CIFAR20.values() for c in members] if classes == 100 else [f"c{i}" for i in range(10)]
    )
    name, md5 = put(kind.meta["filename"], {kind.meta["key"]: sorted(names)})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": name, "md5": md5})


def test_digits_are_whole_and_the_split_is_stable():
    digits = data_set("digits")
    assert digits.classes == [str(i) for i in range(10)]
    assert len(digits.train) + len(digits.test) == 1797
    assert 300 < len(digits.test) < 420
    assert digits.train.digest == data_set("digits").train.digest
    x = next(digits.train.batches([torch.arange(len(digits.train))]))
    assert x.shape[1:] == (1, 8, 8)
    assert x.mean().abs() < 0.05
    assert (x.std() - 1).abs() < 0.05


def test_validation_depends_on_identity_alone():
    digits = data_set("digits", validation=0.2)
    assert 0.15 < (~digits.trainable).float().mean() < 0.25
    fewer = data_set("digits", validation=0.2, limit=300)
    assert len(fewer.train) == 300
    assert set(fewer.held_out.names) == set(digits.held_out.names) & set(fewer.train.names)
    assert list(digits.held_out.names) == [digits.train.names[i] for i in digits.withheld]


def test_fashion_mnist_has_torchvisions_names_and_does_not_wait_for_it(tmp_path):
    assert list(data.builtin.FASHION_MNIST) == torchvision.datasets.FashionMNIST.classes
    write_idx(tmp_path)
    settings = f"DataConfig(name='fashion_mnist', root=__import__('pathlib').Path({str(tmp_path)!r}))"
    read = f"from megu_cli import data; from megu_cli.config import DataConfig; data.load({settings})"
    assert process("-c", f"{read}; import sys; sys.exit('torchvision' in sys.modules)").returncode == 0


def test_fashion_mnist_from_idx_files(tmp_path):
    write_idx(tmp_path)
    fashion = data_set("fashion_mnist", root=tmp_path)
    assert (len(fashion.train), len(fashion.test), fashion.channels) == (30, 10, 1)
    assert fashion.classes[6] == "Shirt"
    raw = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    x = next(fashion.train.batches([torch.tensor([3])]))[0, 0]
    expected = (np.frombuffer(raw, np.uint8).reshape(30, 28, 28)[3] / 255 - 0.2860) / 0.3530
    assert np.allclose(x, expected, atol=1e-5)


def test_fashion_mnist_names_both_ways_when_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(data.builtin, "DEBIAN_FASHION_MNIST", tmp_path / "none")

    def refuse(*_, **__):
        raise RuntimeError("no route")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", refuse)
    with pytest.raises(DataError) as error:
        data_set("fashion_mnist", root=tmp_path / "here")
    assert "no route" in str(error.value)
    assert "download it once" in str(error.value)
    assert "dataset-fashion-mnist" in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "magic"])
def test_damaged_idx_files(tmp_path, damage):
    write_idx(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(
        path.read_bytes()[:20] if damage == "cut" else gzip.compress(struct.pack(">II", 0x803, 30) + b"0" * 30)
    )
    with pytest.raises(DataError, match="train-labels"):
        data_set("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(("name", "kind", "classes", "concepts"), [
    ("cifar10", torchvision.datasets.CIFAR10, 10, 10),
    ("cifar100", torchvision.datasets.CIFAR100, 100, 100),
    ("cifar20", torchvision.datasets.CIFAR100, 20, 100),
])  # fmt: skip
def test_cifar_from_files_of_its_format(tmp_path, monkeypatch, name, kind, classes, concepts):
    write_cifar(tmp_path, kind, monkeypatch)
    cifar = data_set(name, root=tmp_path)
    assert (len(cifar.classes), len(cifar.concepts), cifar.channels) == (classes, concepts, 3)
    assert next(cifar.train.batches([torch.tensor([0, 1])])).shape == (2, 3, 32, 32)
    if name == "cifar20":
        rocket = cifar.concepts.index("rocket")
        assert cifar.classes[cifar.concept_class[rocket]] == "vehicles 2"
        assert all(len(members) == 5 for members in data.CIFAR20.values())


def test_superclasses_turn_fine_labels_into_coarse_ones():
    coarse = data_set("digits", superclasses={"low": list("01234"), "high": list("56789")})
    assert coarse.classes == ["low", "high"]
    assert torch.equal(coarse.train.labels, (coarse.train.concepts >= 5).long())
    assert coarse.train.digest != data_set("digits").train.digest


def test_an_image_folder_in_memory_and_streamed_is_the_same(tmp_path):
    write_folder(tmp_path)
    order = [torch.tensor([4, 0, 14]), torch.tensor([7])]
    memory = data_set("imagefolder", root=tmp_path, image_size=8)
    streamed = data_set("imagefolder", root=tmp_path, image_size=8, memory_limit=1e-9)
    assert memory.classes == ["cat", "dog", "eel"]
    for a, b in zip(memory.train.batches(order), streamed.train.batches(order), strict=True):
        assert a.shape[1:] == (3, 8, 8)
        assert torch.equal(a, b)
    assert memory.train.digest == streamed.train.digest


def test_the_digest_of_a_folder_follows_its_content(tmp_path):
    write_folder(tmp_path)
    first = data_set("imagefolder", root=tmp_path, image_size=8)
    changed = tmp_path / "train" / "dog" / "0.png"
    Image.fromarray(np.zeros((20, 16, 3), np.uint8)).save(changed)
    second = data_set("imagefolder", root=tmp_path, image_size=8)
    assert first.train.digest != second.train.digest
    assert first.test.digest == second.test.digest


def test_grey_images_are_repeated_for_a_model_that_wants_colour():
    digits = data_set("digits", channels=3, image_size=16)
    x = next(digits.train.batches([torch.tensor([0])]))
    assert x.shape == (1, 3, 16, 16)
    assert torch.equal(x[:, 0], x[:, 2])


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        data_set("imagefolder", root=tmp_path / "none", image_size=8)
    with pytest.raises(DataError, match="holds no folders of classes"):
        data_set("imagefolder", root=tmp_path, image_size=8)
    with pytest.raises(DataError, match=r"needs data\.image_size"):
        data_set("imagefolder")


def test_tarfile_is_not_needed_for_what_is_unpacked(tmp_path, monkeypatch):
    write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("unpacked again"))
    data_set("cifar10", root=tmp_path)
