"""Data sets: images as tensors or streamed from disk behind one interface, with the labels beside them."""

from megu_cli.data.builtin import CIFAR20
from megu_cli.data.decode import Preprocessing, Resizing
from megu_cli.data.images import EncodedImages, Images, MemoryImages
from megu_cli.data.loading import holding_out, load, reordered, sampled
from megu_cli.data.own import Reserved
from megu_cli.data.splits import Dataset, Split

__all__ = [
    "CIFAR20",
    "Dataset",
    "EncodedImages",
    "Images",
    "MemoryImages",
    "Preprocessing",
    "Reserved",
    "Resizing",
    "Split",
    "holding_out",
    "load",
    "reordered",
    "sampled",
]
