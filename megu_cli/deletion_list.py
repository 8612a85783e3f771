"""Deletion lists: a CSV that names images, by index or by relative path, a line each."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megu_cli.data import Dataset
from megu_cli.data.names import composed
from megu_cli.data.paths import relative
from megu_cli.errors import DataError, Faults

_INDEX = re.compile(r"-?[0-9]+")


def listed(path: Path, data: Dataset, key: str, gone: bool = False) -> list[int]:
    """Positions listed in a CSV: the first column of each line, an index or a relative path.

    Args:
        path: The CSV; a header is allowed.
        data: The data set.
        key: Named in errors.
        gone: Images may have left the data since.

    Raises:
        DataError: The file is missing, or lines are out of range, unknown or there twice; up to five are named.
    """
    names, number = data.train.names, data.own
    # The few that are listed are looked for among all: a table of all names would take the memory of the data set.
    wanted: dict[str, list[tuple[int, str]]] = {}
    seen: dict[int, int] = {}
    faults = Faults(f"lines of {path} are at fault")

    def take(line: int, cell: str, position: int) -> None:
        if position in seen:
            faults.add(f"{key}: line {line}: {cell} stands in line {seen[position]} already")
        else:
            seen[position] = line

    for line, cell in _cells(path, key):
        if not _INDEX.fullmatch(cell):
            wanted.setdefault(_tidy(cell), []).append((line, cell))
        elif data.test_made:
            faults.add(f"{key}: line {line}: {cell}: where megu makes the test split an index names nothing that lasts")
        elif 0 <= int(cell) < number:
            take(line, cell, int(cell))
        else:
            faults.add(f"{key}: line {line}: {cell} is no index below {number}")

    def search(form: Any) -> None:
        for position, name in zip(range(number), names, strict=False):
            for known in dict.fromkeys((form(name), form(name.removeprefix("train/")))):
                for line, cell in wanted.pop(known, []):
                    take(line, cell, position)

    if wanted:
        search(str)
    if any(not name.isascii() for name in wanted):
        wanted = {composed(name): cells for name, cells in wanted.items()}
        search(composed)
    if wanted and not gone:
        unseen = _among(wanted, chain(data.test.names, islice(names, number, None)))
        for name, cells in wanted.items():
            for line, cell in cells:
                why = "is a test image: nothing was trained on it" if name in unseen else "is no image of the data"
                faults.add(f"{key}: line {line}: {cell} {why}")
    faults.check("Give relative paths." if data.test_made else "")
    return sorted(seen)


def paths_in(path: Path) -> list[str]:
    """Relative paths that a deletion list names, in any of the ways that the names of images are looked up.

    Raises:
        DataError: It cannot be read.
    """
    return [_tidy(cell) for _, cell in _cells(path, "forget.samples")]


def has_indices(path: Path) -> bool:
    """Whether a deletion list counts images.

    Raises:
        DataError: It cannot be read.
    """
    return any(_INDEX.fullmatch(cell) for _, cell in _cells(path, "forget.samples"))


def _cells(path: Path, key: str) -> list[tuple[int, str]]:
    """Line and first column of each line of a CSV; empty ones and a header do not count."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            cells = [(reader.line_num, row[0].strip()) for row in reader if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{key}: {path} cannot be read: {error}") from None
    return cells[1:] if cells and cells[0][1].lower() in ("index", "path", "sample", "file", "name") else cells


def _tidy(cell: str) -> str:
    try:
        return relative(cell)
    except DataError:
        return cell  # it names no image, which is said where it is looked up


def _among(wanted: Iterable[str], names: Iterable[str]) -> set[str]:
    keys = set(wanted)
    return {key for name in names for key in (name, name.removeprefix("test/")) if key in keys}
