"""Data sets: images as tensors or streamed from disk behind one interface, with the labels beside them."""

from megu_cli.data.builtin import CIFAR20
from megu_cli.data.images import Dataset, FileImages, Images, MemoryImages, Split
from megu_cli.data.loading import NORMALISATION, load, sampled

__all__ = [
    "CIFAR20",
    "NORMALISATION",
    "Dataset",
    "FileImages",
    "Images",
    "MemoryImages",
    "Split",
    "load",
    "sampled",
]
