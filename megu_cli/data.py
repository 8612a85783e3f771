"""Data sets: images as tensors or streamed from disk behind one interface, with the labels beside them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megu_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_GRAY = ((0.5,), (0.5,))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
NORMALISATION = {
    "digits": ((0.3,), (0.37,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": _CIFAR,
    "cifar20": _CIFAR,
    "cifar100": _CIFAR,
    "imagefolder": _IMAGENET,
}
# Data sets of small images of one size, which models take as they are.
SMALL = frozenset({"digits", "fashion_mnist", "cifar10", "cifar20", "cifar100"})
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
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class Images(Protocol):
    """Images of one split: uint8 pixels, by position."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, position: int) -> Tensor:
        """The image at a position: uint8 (C, H, W)."""

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """One uint8 tensor (B, C, H, W) for each tensor of positions in ``order``."""

    def at(self, index: Tensor) -> Images:
        """The images at ``index`` alone."""


class MemoryImages:
    """Images that fit in memory: one uint8 tensor (N, C, H, W)."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> Tensor:
        return self.pixels[position]

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Images.batches`."""
        return (self.pixels[index] for index in order)

    def at(self, index: Tensor) -> MemoryImages:
        """The images at ``index`` alone."""
        return MemoryImages(self.pixels[index])


class FileImages:
    """Images on disk: decoded as they are asked for, or all at the first use where they are to be kept in memory."""

    def __init__(self, files: Sequence[Path], decode: Callable[[Path], Tensor], workers: int, keep: bool) -> None:
        self.files, self.decode, self.workers, self.keep = files, decode, workers, keep
        self._kept: MemoryImages | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor:
        return self.decode(self.files[position])

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Images.batches`."""
        if not self.keep:
            return self._decoded(order)
        if self._kept is None:
            everything = list(torch.arange(len(self)).split(256))
            self._kept = MemoryImages(torch.cat(list(self._decoded(everything))))
        return self._kept.batches(order)

    def at(self, index: Tensor) -> FileImages:
        """The images at ``index`` alone."""
        return FileImages([self.files[i] for i in index.tolist()], self.decode, self.workers, self.keep)

    def _decoded(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        loader: torch.utils.data.DataLoader[Tensor] = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=[index.tolist() for index in order],
            num_workers=self.workers,
            collate_fn=torch.stack,
        )
        return iter(loader)


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        images: The pixels.
        labels: (N,) int64, the class that the model predicts.
        concepts: (N,) int64, the finest class known; equals ``labels`` where there are no superclasses.
        names: Identity of each sample, such as its relative path.
        mean: (C, 1, 1) for normalisation.
        std: (C, 1, 1) for normalisation.
        digest: sha256 of the content: names, labels and pixels.
    """

    images: Images
    labels: Tensor
    concepts: Tensor
    names: Sequence[str]
    mean: Tensor
    std: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Normalised float32 images (B, C, H, W), channels_last, for each tensor of positions in ``order``."""
        mean, std = self.mean.to(device), self.std.to(device)
        for pixels in self.images.batches(order):
            pixels = pixels.to(device).expand(-1, len(mean), -1, -1)
            yield pixels.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def pass_over(
        self, index: Tensor, size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, images) over ``index`` in its order, ``size`` at a time."""
        order = list(index.split(size))
        return zip(order, self.batches(order, device), strict=True)


@dataclass(frozen=True)
class Dataset:
    """A data set whose classes a model predicts.

    Attributes:
        name: Its name in the config.
        classes: Names of the K classes.
        concepts: Names of the finest classes; equals ``classes`` without superclasses.
        concept_class: (len(concepts),) int64, the class of each concept.
        train: All training images.
        test: Test images.
        validation: (N,) bool over ``train``: held out by hash of identity, never trained on by `megu train`.
        channels: Channels of the images that a model sees.
    """

    name: str
    classes: list[str]
    concepts: list[str]
    concept_class: Tensor
    train: Split
    test: Split
    validation: Tensor

    @property
    def channels(self) -> int:
        """Channels of the images that a model sees."""
        return len(self.train.mean)


@dataclass(frozen=True)
class _Raw:
    """What a loader gives: pixels and fine labels of both splits."""

    classes: list[str]
    train: tuple[Images, np.ndarray[Any, Any], Sequence[str]]
    test: tuple[Images, np.ndarray[Any, Any], Sequence[str]]
    digests: tuple[str, str]


def load(
    name: str,
    *,
    root: Path | None = None,
    superclasses: dict[str, list[str]] | None = None,
    validation: float = 0.05,
    limit: int | None = None,
    image_size: int | None = None,
    memory_limit: float = 2.0,
    workers: int = 0,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bilinear",
    crop: float = 1.0,
    stretch: bool = False,
    file_digests: Callable[[Sequence[Path]], list[str]] | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        name: A name of the config's ``data.name``.
        root: Where the files are, or are downloaded to.
        superclasses: Superclass name to its member classes; every class belongs to exactly one.
        validation: Share of the training images held out.
        limit: Number of training images to use.
        image_size: Side in pixels to resize to.
        memory_limit: GiB of decoded images to keep in memory.
        workers: Processes that decode streamed images.
        channels: Channels that the model takes; grey images are repeated.
        mean: Of each channel, or one for all, for pixels from 0 to 1; ``None``: the data set's own.
        std: Likewise.
        interpolation: Of the resizing: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, ``box`` or ``hamming``.
        crop: Images are resized to ``image_size / crop``, and the centre is cut out.
        stretch: Both sides are resized, rather than the shorter one and the longer one cut.
        file_digests: sha256 of each file, for instance from a memo; the default reads them.

    Raises:
        DataError: The files are missing or damaged, or the superclasses do not fit.
    """
    resizing = Resizing(image_size, interpolation, crop, stretch) if image_size else None
    if name == "imagefolder":
        raw = _imagefolder(root, resizing, memory_limit, workers, channels, file_digests or _read_digests)
    else:
        raw = _LOADERS[name](root)
        if resizing:
            raw = _resized(raw, resizing)
    if name == "cifar20" and superclasses is None:
        superclasses = CIFAR20
    classes, concept_class = _coarse(raw.classes, superclasses)

    there = len(NORMALISATION[name][0])
    wanted = channels or max(there, len(mean or ()))
    if there > wanted:
        raise DataError(
            f"the model takes {wanted}-channel images, {name} has {there}",
            "Choose another model.name; grey images can be repeated, colours cannot be dropped.",
        )
    means, stds = (_per_channel(given, own, wanted)
                   for given, own in zip((mean, std), NORMALISATION[name], strict=True))  # fmt: skip

    splits = []
    for (images, fine, names), content in zip((raw.train, raw.test), raw.digests, strict=True):
        concepts = torch.as_tensor(fine, dtype=torch.int64)
        digest = hashlib.sha256(repr((raw.classes, classes, superclasses, content)).encode()).hexdigest()
        splits.append(Split(images, concept_class[concepts], concepts, names, means, stds, digest))
    train, test = splits
    if limit is not None and limit < len(train):
        train = _limited(train, limit)
    held_out = torch.from_numpy(_hash(train.names, "validation") < validation)
    return Dataset(name, classes, raw.classes, concept_class, train, test, held_out)


def _per_channel(given: Sequence[float] | None, own: Sequence[float], channels: int) -> Tensor:
    """(C, 1, 1) of what is given, else of the data set's own.

    Raises:
        DataError: It is given for another number of channels.
    """
    values = torch.tensor(own if given is None else given).view(-1, 1, 1)
    if len(values) not in (1, channels):
        raise DataError(
            f"a normalisation of {len(values)} channels is given, and the model takes {channels}",
            "Give model.mean and model.std one number, or one for each channel.",
        )
    return values.expand(channels, 1, 1)


def reordered(data: Dataset, order: Sequence[int]) -> Dataset:
    """The data set with its classes in another order.

    Args:
        data: The data set.
        order: (K,) for each new class the position that it had.
    """
    if list(order) == list(range(len(data.classes))):
        return data
    new = torch.empty(len(order), dtype=torch.int64)
    new[torch.tensor(order)] = torch.arange(len(order))
    # Without superclasses, concepts are the classes, and stay so.
    same = data.concepts == data.classes
    classes = [data.classes[old] for old in order]

    def moved(split: Split) -> Split:
        labels = new[split.labels]
        digest = hashlib.sha256(f"{split.digest} {new.tolist()}".encode()).hexdigest()
        return replace(split, labels=labels, concepts=labels if same else split.concepts, digest=digest)

    return replace(
        data,
        classes=classes,
        concepts=classes if same else data.concepts,
        concept_class=torch.arange(len(order)) if same else new[data.concept_class],
        train=moved(data.train),
        test=moved(data.test),
    )


def _hash(names: Sequence[str], purpose: str) -> np.ndarray[Any, Any]:
    """A number in [0, 1) for each name that depends on nothing but the name and the purpose."""
    digests = b"".join(hashlib.sha256(f"{purpose}/{name}".encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, dtype=">u8") / 2.0**64


def sampled(split: Split, positions: Sequence[int], number: int) -> list[int]:
    """Up to ``number`` of ``positions``, chosen by hash of the images' identity: the same ones whatever the seed."""
    rank = _hash([split.names[i] for i in positions], "similarity")
    return [positions[i] for i in np.argsort(rank, kind="stable")[:number]]


def _limited(split: Split, limit: int) -> Split:
    keep = np.sort(np.argsort(_hash(split.names, "limit"), kind="stable")[:limit])
    index = torch.from_numpy(keep)
    images = split.images.at(index)
    names = [split.names[i] for i in keep]
    digest = hashlib.sha256(f"{split.digest} {limit}".encode()).hexdigest()
    return Split(images, split.labels[index], split.concepts[index], names, split.mean, split.std, digest)


def _coarse(fine: list[str], superclasses: dict[str, list[str]] | None) -> tuple[list[str], Tensor]:
    """Class names of the model, and the class of each fine class.

    Raises:
        DataError: A member is unknown, a class is in none or in two superclasses.
    """
    if superclasses is None:
        return fine, torch.arange(len(fine))
    faults = [f"{m!r} is no class" for m in itertools.chain(*superclasses.values()) if m not in fine]
    owner = {name: [s for s, members in superclasses.items() if name in members] for name in fine}
    faults += [
        f"{name!r} is in {len(o) or 'no'} superclass{'es' if o else ''}" for name, o in owner.items() if len(o) != 1
    ]
    if faults:
        raise DataError(f"data.superclasses: {'; '.join(faults)}", f"The classes are: {', '.join(fine)}.")
    names = list(superclasses)
    return names, torch.tensor([names.index(owner[name][0]) for name in fine])


def _in_memory(classes: list[str], train: Any, test: Any) -> _Raw:
    """Splits of (uint8 array (N, H, W) or (N, H, W, C), labels) as tensors with their digests."""
    parts, digests = [], []
    for split, (pixels, labels) in (("train", train), ("test", test)):
        pixels = np.array(pixels)  # a copy of our own: what a reader gives may be read-only
        labels = np.asarray(labels, dtype=np.int64)
        tensor = torch.from_numpy(pixels)
        tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
        total = hashlib.sha256(f"{split} {pixels.shape}".encode())
        total.update(pixels.tobytes())
        total.update(labels.tobytes())
        parts.append((MemoryImages(tensor.contiguous()), labels, [f"{split}/{i}" for i in range(len(labels))]))
        digests.append(total.hexdigest())
    return _Raw(classes, parts[0], parts[1], (digests[0], digests[1]))


@dataclass(frozen=True)
class Resizing:
    """How an image becomes square; the words are those of `load`."""

    size: int
    interpolation: str = "bilinear"
    crop: float = 1.0
    stretch: bool = False

    @property
    def before(self) -> int:
        """Side before the centre is cut out."""
        return int(self.size / self.crop + 1e-6)  # cut off, as libraries do; but not for an error of rounding

    @property
    def key(self) -> Any:
        """Of the digests: the size alone, unless something is unusual."""
        usual = (self.interpolation, self.crop, self.stretch) == ("bilinear", 1.0, False)
        return self.size if usual else (self.size, self.interpolation, self.crop, self.stretch)

    def of_picture(self, image: Image.Image) -> Image.Image:
        """A square image of any image."""
        from PIL import Image, ImageOps

        method = Image.Resampling[self.interpolation.upper()]
        side = (self.before, self.before)
        square = image.resize(side, method) if self.stretch else ImageOps.fit(image, side, method)
        first = (self.before - self.size) // 2
        return square if not first else square.crop((first, first, first + self.size, first + self.size))

    def of_tensor(self, pixels: Tensor) -> Tensor:
        """Square uint8 images (N, C, S, S) of images that are about square (N, C, H, W)."""
        # Of the methods, torch knows these; the others are near bilinear.
        mode = self.interpolation if self.interpolation in ("nearest", "bicubic") else "bilinear"
        side = (self.before, self.before)
        first = (self.before - self.size) // 2
        blocks = [
            torch.nn.functional.interpolate(block.float(), side, mode=mode, antialias=mode != "nearest")
            .round_()
            .clamp_(0, 255)
            .byte()[:, :, first : first + self.size, first : first + self.size]
            for block in pixels.split(4096)
        ]
        return torch.cat(blocks)


def _resized(raw: _Raw, resizing: Resizing) -> _Raw:
    def resize(part: Any) -> Any:
        images, labels, names = part
        return MemoryImages(resizing.of_tensor(images.pixels)), labels, names

    digests = tuple(f"{d} {resizing.key}" for d in raw.digests)
    return _Raw(raw.classes, resize(raw.train), resize(raw.test), (digests[0], digests[1]))


def _digits(root: Path | None) -> _Raw:
    """scikit-learn's 1,797 digits of 8x8 pixels; every fifth by hash is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    test = _hash([f"digits/{i}" for i in range(len(pixels))], "test") < 0.2
    parts = [(pixels[mask], bunch.target[mask]) for mask in (~test, test)]
    return _in_memory([str(name) for name in bunch.target_names], *parts)


def _fashion_mnist(root: Path | None) -> _Raw:
    import torchvision

    classes = list(torchvision.datasets.FashionMNIST.classes)
    folder = root or DEBIAN_FASHION_MNIST
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return _in_memory(classes, *(_idx_pair(folder, prefix) for prefix in ("train", "t10k")))
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


def _cifar(kind: str) -> Callable[[Path | None], _Raw]:
    def load_it(root: Path | None) -> _Raw:
        import torchvision

        reader = getattr(torchvision.datasets, kind)
        train, test = _downloaded(reader, root, f"put {reader.base_folder} of the python version into data.root")
        return _in_memory(list(train.classes), *((s.data, s.targets) for s in (train, test)))

    return load_it


def _downloaded(reader: Any, root: Path | None, otherwise: str) -> tuple[Any, Any]:
    """Train and test split by torchvision's loader, downloaded where they are not there.

    Raises:
        DataError: Neither there nor to be downloaded, or damaged.
    """
    folder = root or Path.home() / ".cache" / "megu" / "data"
    try:
        return tuple(reader(folder, train=train, download=True) for train in (True, False))
    except Exception as error:  # torchvision lets through whatever urllib, tarfile and pickle raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{reader.__name__}: nothing usable in {folder}, and the download failed ({reason})",
            f"Either let megu download it once on a machine with a network, or {otherwise}.",
        ) from None


_LOADERS: dict[str, Callable[[Path | None], _Raw]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10"),
    "cifar20": _cifar("CIFAR100"),
    "cifar100": _cifar("CIFAR100"),
}


def _imagefolder(
    root: Path | None,
    resizing: Resizing | None,
    memory_limit: float,
    workers: int,
    channels: int | None,
    file_digests: Callable[[Sequence[Path]], list[str]],
) -> _Raw:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``."""
    if root is None or resizing is None:
        raise DataError("data.name: imagefolder needs data.root and data.image_size")
    size = resizing.size
    folders = {split: root / split for split in ("train", "test")}
    for folder in folders.values():
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder", "An imagefolder has train/CLASS/ and test/CLASS/ in data.root.")
    classes = sorted(d.name for d in folders["train"].iterdir() if d.is_dir())
    unknown = sorted({d.name for d in folders["test"].iterdir() if d.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{folders['test']}: classes without training images: {', '.join(unknown)}")

    def decode(path: Path) -> Tensor:
        return _decode(path, resizing, channels or 3)

    parts, digests = [], []
    for split, folder in folders.items():
        files, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files += found
            labels += [label] * len(found)
        if not files:
            raise DataError(f"{folder} holds no images")
        names = [f"{split}/{path.relative_to(folder).as_posix()}" for path in files]
        rows = list(zip(names, labels, file_digests(files), strict=True))
        digests.append(hashlib.sha256(repr((rows, resizing.key)).encode()).hexdigest())
        fits = len(files) * (channels or 3) * size * size <= memory_limit * 2**30
        parts.append((FileImages(files, decode, workers, keep=fits), np.array(labels), names))
    return _Raw(classes, parts[0], parts[1], (digests[0], digests[1]))


def _read_digests(files: Sequence[Path]) -> list[str]:
    from megu_cli.artifacts import file_digest

    return [file_digest(path) for path in files]


def _decode(path: Path, resizing: Resizing, channels: int) -> Tensor:
    """An image file as a square uint8 tensor (C, S, S).

    Raises:
        DataError: The file is no image that can be decoded whole.
    """
    from PIL import Image, ImageOps

    size = resizing.size
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
            square = resizing.of_picture(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it")
        raise DataError(f"{path} cannot be decoded: {reason}", "Repair it or take it out of the folder.") from None
    array = np.asarray(square, dtype=np.uint8).copy()
    return torch.from_numpy(array.reshape(size, size, -1)).permute(2, 0, 1)
