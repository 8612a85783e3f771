"""Names of images: kept small, hashed, and turned into numbers."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class Names(Sequence[str]):
    """Many strings in little memory: their UTF-8 bytes one after the other, and where each ends.

    A list of a million paths takes about 100 MB, this about 40.

    Args:
        text: The bytes of all strings.
        ends: (N,) int64, where each ends.
    """

    def __init__(self, text: bytes, ends: np.ndarray[Any, Any]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Pack strings."""
        text = bytearray()

        def lengths() -> Iterator[int]:
            for name in names:
                text.extend(name.encode())
                yield len(text)

        ends = np.fromiter(lengths(), dtype=np.int64)
        return cls(bytes(text), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> Names: ...

    def __getitem__(self, position: int | slice) -> str | Names:
        if isinstance(position, slice):
            return self.at(np.arange(len(self))[position])
        position = range(len(self))[position]
        start = int(self.ends[position - 1]) if position else 0
        return self.text[start : int(self.ends[position])].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends:
            yield self.text[start:end].decode()
            start = end

    def at(self, index: np.ndarray[Any, Any]) -> Names:
        """The names at positions."""
        return Names.of(self[int(i)] for i in index)


def picked(names: Sequence[str], index: np.ndarray[Any, Any]) -> Sequence[str]:
    """The names at positions, packed where they were."""
    return names.at(index) if isinstance(names, Names) else [names[i] for i in index]


def chained(first: Sequence[str], second: Sequence[str]) -> Sequence[str]:
    """Names after names, packed where they were."""
    if isinstance(first, Names) and isinstance(second, Names):
        return Names(first.text + second.text, np.concatenate([first.ends, second.ends + len(first.text)]))
    return [*first, *second]


def hashed(names: Iterable[str], purpose: str) -> np.ndarray[Any, Any]:
    """A number in [0, 1) for each name that depends on nothing but the name and the purpose."""
    digests = (hashlib.sha256(f"{purpose}/{name}".encode()).digest() for name in names)
    return np.fromiter((int.from_bytes(d[:8], "big") for d in digests), dtype=np.uint64) / 2.0**64


def composed(name: str) -> str:
    """The name in Unicode's composed form: macOS writes letters and their accents apart, most others together."""
    return unicodedata.normalize("NFC", name)


def alike(name: str) -> str:
    """What two names that a person would take for the same have in common: form, case and spaces do not count."""
    return " ".join(composed(name).casefold().split())
