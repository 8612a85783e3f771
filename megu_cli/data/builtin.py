"""The data sets that come with scikit-learn and torchvision."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megu_cli.config.places import DEBIAN_FASHION_MNIST, downloads
from megu_cli.data.decode import Resizing
from megu_cli.data.images import MemoryImages, Part, Raw
from megu_cli.data.names import hashed
from megu_cli.errors import DataError

FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
# The 20 superclasses of CIFAR-100 (Krizhevsky, 2009).
CIFAR20 = {
    "aquatic mammals": ["beaver", "dolphin", "otter", "seal", "whale"],
    "fish": ["aquarium_fish", "flatfish", "ray", "shark", "trout"],
    "flowers": ["orchid", "poppy", "rose", "sunflower", "tulip"],
    "food containers": ["bottle", "bowl", "can", "cup", "plate"],
    "fruit and vegetables": ["apple", "mushroom", "orange", "pear", "sweet_pepper"],
    "household electrical devices": ["clock", "keyboard", "lamp", "telephone", "television"],
    "household furniture": ["bed", "chair", "couch", "table", "wardrobe"],
    "insects": ["bee", "beetle", "butterfly", "caterpillar", "cockroach"],
    "large carnivores": ["bear", "leopard", "lion", "tiger", "wolf"],
    "large man-made outdoor things": ["bridge", "castle", "house", "road", "skyscraper"],
    "large natural outdoor scenes": ["cloud", "forest", "mountain", "plain", "sea"],
    "large omnivores and herbivores": ["camel", "cattle", "chimpanzee", "elephant", "kangaroo"],
    "medium-sized mammals": ["fox", "porcupine", "possum", "raccoon", "skunk"],
    "non-insect invertebrates": ["crab", "lobster", "snail", "spider", "worm"],
    "people": ["baby", "boy", "girl", "man", "woman"],
    "reptiles": ["crocodile", "dinosaur", "lizard", "snake", "turtle"],
    "small mammals": ["hamster", "mouse", "rabbit", "shrew", "squirrel"],
    "trees": ["maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"],
    "vehicles 1": ["bicycle", "bus", "motorcycle", "pickup_truck", "train"],
    "vehicles 2": ["lawn_mower", "rocket", "streetcar", "tank", "tractor"],
}


def _in_memory(classes: list[str], train: Any, test: Any) -> Raw:
    """Splits of (uint8 array (N, H, W) or (N, H, W, C), labels) as tensors with their digests."""
    parts = []
    for split, (pixels, labels) in (("train", train), ("test", test)):
        pixels = np.array(pixels)  # a copy of our own: what a reader gives may be read-only
        labels = np.asarray(labels, dtype=np.int64)
        tensor = torch.from_numpy(pixels)
        tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
        total = hashlib.sha256(f"{split} {pixels.shape}".encode())
        total.update(pixels.tobytes())
        total.update(labels.tobytes())
        names = [f"{split}/{i}" for i in range(len(labels))]
        parts.append(Part(MemoryImages(tensor.contiguous()), torch.from_numpy(labels), names, total.hexdigest()))
    return Raw(classes, parts[0], parts[1])


def resized(raw: Raw, resizing: Resizing) -> Raw:
    """The images of a data set of this module at another size."""

    def resize(part: Part) -> Part:
        blocks = part.images.batches(list(torch.arange(len(part.labels)).split(4096)))
        scaled = torch.cat([resizing.of_tensor(block) for block in blocks])
        return replace(part, images=MemoryImages(scaled), digest=f"{part.digest} {resizing.key}")

    return replace(raw, train=resize(raw.train), test=resize(raw.test))


def digits(root: Path | None) -> Raw:
    """scikit-learn's 1,797 digits of 8x8 pixels; every fifth by hash is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    test = hashed([f"digits/{i}" for i in range(len(pixels))], "test") < 0.2
    parts = [(pixels[mask], bunch.target[mask]) for mask in (~test, test)]
    return _in_memory([str(name) for name in bunch.target_names], *parts)


def fashion_mnist(root: Path | None) -> Raw:
    """Fashion-MNIST (Xiao et al., 2017): Debian's files, or torchvision's."""
    classes, folder = list(FASHION_MNIST), root or DEBIAN_FASHION_MNIST
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return _in_memory(classes, *(_idx_pair(folder, prefix) for prefix in ("train", "t10k")))

    import torchvision  # as slow as torch itself: only where it is needed

    train, test = _downloaded(
        torchvision.datasets.FashionMNIST,
        root,
        "install Debian's package dataset-fashion-mnist, or put its four idx files (*-ubyte.gz) into data.root",
    )
    return _in_memory(classes, *((s.data.numpy(), s.targets.numpy()) for s in (train, test)))


def _idx_pair(folder: Path, prefix: str) -> tuple[Any, Any]:
    """Images and labels in the idx format of MNIST (LeCun), gzipped."""
    import gzip

    def read(file: str, magic: int) -> np.ndarray[Any, Any]:
        path = folder / file
        try:
            data = gzip.decompress(path.read_bytes())
            ndim = magic & 0xFF
            found, *shape = np.frombuffer(data, ">u4", ndim + 1)
            array = np.frombuffer(data, np.uint8, offset=4 * (ndim + 1)).reshape([int(n) for n in shape])
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if found != magic:
            raise DataError(f"{path} is no idx file of the expected kind (magic {found}, not {magic})")
        return array

    return read(f"{prefix}-images-idx3-ubyte.gz", 0x803), read(f"{prefix}-labels-idx1-ubyte.gz", 0x801)


def cifar10(root: Path | None) -> Raw:
    """CIFAR-10 (Krizhevsky, 2009)."""
    return _cifar("CIFAR10", root)


def cifar100(root: Path | None) -> Raw:
    """CIFAR-100 (Krizhevsky, 2009)."""
    return _cifar("CIFAR100", root)


def cifar20(root: Path | None) -> Raw:
    """CIFAR-100 with its 20 superclasses as the model's classes."""
    return replace(cifar100(root), superclasses=CIFAR20)


def _cifar(kind: str, root: Path | None) -> Raw:
    import torchvision

    reader = getattr(torchvision.datasets, kind)
    train, test = _downloaded(reader, root, f"put {reader.base_folder} of the python version into data.root")
    return _in_memory(list(train.classes), *((s.data, s.targets) for s in (train, test)))


def _downloaded(reader: Any, root: Path | None, otherwise: str) -> tuple[Any, Any]:
    """Train and test split by torchvision's loader, downloaded where they are not there.

    Raises:
        DataError: Neither there nor to be downloaded, or damaged.
    """
    folder = root or downloads()
    try:
        return tuple(reader(folder, train=train, download=True) for train in (True, False))
    except Exception as error:  # torchvision lets through whatever urllib, tarfile and pickle raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{reader.__name__}: nothing usable in {folder}, and the download failed ({reason})",
            f"Either let megu download it once on a machine with a network, or {otherwise}.",
        ) from None
