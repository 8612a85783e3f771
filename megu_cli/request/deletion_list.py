"""Deletion lists: text files that name images, by relative path or by index, a line each."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from megu_cli.data import Dataset
from megu_cli.data.decode import IMAGE_SUFFIXES
from megu_cli.data.names import composed
from megu_cli.data.paths import relative
from megu_cli.errors import DataError, Faults
from megu_cli.run import reading

_Kind = Literal["path", "index", "either"]
# A longer number is no position.
_INDEX = re.compile(r"-?[0-9]{1,18}")
_PATHS = (
    *("path", "filepath", "file_path", "relative_path", "image_path", "fullname", "full_name"),
    *("filename", "file_name", "file", "image_name", "image", "name"),
)
# Header -> what its column holds. Of several known columns the first in this order is read.
HEADERS: dict[str, _Kind] = {
    **dict.fromkeys(_PATHS, "path"),
    "sample": "either",
    **dict.fromkeys(("index", "idx", "position"), "index"),
}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The mark of UTF-32 begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TEST = ("test", "val")
_NEED_HEADER = "Several columns need a header line with path or index."


@dataclass(frozen=True)
class Listed:
    """The training images that a list names: sorted positions, and the number of lines that name something."""

    positions: list[int]
    lines: int


@dataclass(frozen=True)
class _Table:
    """The column of a list that is read: what it holds, its header, and line and cell of each row.

    ``beside`` holds, for each cell of a column that may hold indices, the cells of columns of no known header.
    """

    kind: _Kind
    header: str
    cells: list[tuple[int, str]]
    beside: list[list[str]] = field(default_factory=list)


def listed(path: Path, data: Dataset, key: str, missing: Literal["error", "ignore"] = "error") -> Listed:
    """Find the images of a deletion list in a data set.

    An exact name wins. Otherwise a line may be a name without ``train/`` or an index; if that gives two images, the
    line is refused.

    Args:
        path: The list; see docs/data.md for its forms.
        data: The data set.
        key: Named in errors.
        missing: ``ignore``: lines that match no training image are skipped, since the image has left the data.

    Raises:
        DataError: The file cannot be read, or lines are unknown, ambiguous, empty or there twice; five are named.
    """
    faults = Faults(f"lines of {path} are at fault")
    table = _read(path, key, faults)
    if table.header and any(name == table.header for name in _names(data)):
        faults.add(f"{key}: line 1 of {path}: {table.header} is a header, and the name of an image")
    named, loose = _matches([cell for _, cell in table.cells], data)
    others = list(dict.fromkeys(other for row in table.beside for other in row))
    names_beside = {others[i] for i in _matches(others, data)[0]} if others else set()
    lines: dict[int, int] = {}
    # Where lines are names, a number that is none is a slip rather than an index.
    by_name = bool(named) or any(not _INDEX.fullmatch(table.cells[i][1].strip()) for i in loose)
    for i, (line, cell) in enumerate(table.cells):
        if table.kind == "either" and by_name and i not in named and i not in loose and _INDEX.fullmatch(cell.strip()):
            faults.add(f"{key}: line {line}: {cell.strip()} is no name, and other lines are; if all lines are indices, "
                       "call the column index")  # fmt: skip
            continue
        if table.beside and (name := next((other for other in table.beside[i] if other in names_beside), None)):
            faults.add(_unclear(key, line, cell, name))
            continue
        try:
            position = _position(cell.strip(), table.kind, named.get(i, set()), loose.get(i, set()), data)
        except DataError as error:
            faults.add(f"{key}: line {line}: {error.message}")
            continue
        if position is None or position >= len(data.train):
            what = "no image of the data" if position is None else "a test image: nothing was trained on it"
            more = f". {_NEED_HEADER}" if any(mark in cell for mark in _DELIMITERS) and not table.header else ""
            if missing == "error":
                faults.add(f"{key}: line {line}: {cell.strip()} is {what}{more}")
        elif position in lines:
            faults.add(f"{key}: line {line}: {cell.strip()} stands in line {lines[position]} already")
        else:
            lines[position] = line
    faults.check(_hint(data, key))
    return Listed(sorted(lines), len(table.cells))


def _hint(data: Dataset, key: str) -> str:
    if key == "forget.already":
        return "If these images have left the data, set forget.already_missing: ignore."
    return "Give relative paths." if data.test_made else "Give paths relative to data.root, as docs/data.md shows."


def paths_in(path: Path, root: Path | None) -> list[str]:
    """Names that a deletion list may mean, in every form in which they are looked up.

    Args:
        path: The list.
        root: The folder that the names of the data are relative to.

    Raises:
        DataError: It cannot be read.
    """
    return [form for _, cell in _read(path, "forget.samples").cells for form in _forms(cell, root)]


def cells(path: Path) -> list[str]:
    """The names or indices that a deletion list holds, in its order.

    Raises:
        DataError: It cannot be read.
    """
    return [cell for _, cell in _read(path, "forget.samples").cells]


def kind_of(path: Path) -> str:
    """What the column of a deletion list holds: ``path``, ``index``, or ``either``.

    Raises:
        DataError: It cannot be read.
    """
    return _read(path, "forget.samples").kind


def has_indices(path: Path) -> bool:
    """Whether a deletion list may count images.

    Raises:
        DataError: It cannot be read.
    """
    table = _read(path, "forget.samples")
    return table.kind != "path" and any(_INDEX.fullmatch(cell.strip()) for _, cell in table.cells)


# -- the file ----------------------------------------------------------------------------------------------------------


def _read(path: Path, key: str, faults: Faults | None = None) -> _Table:
    """The column of a list that names images.

    Args:
        path: The list.
        key: Named in errors.
        faults: Takes what is wrong in single lines; ``None``: this is not of interest.

    Raises:
        DataError: The file cannot be read, or it is not clear which column is meant.
    """
    faults = faults or Faults("")
    try:
        raw = reading.content(path)
        encoding = next((name for mark, name in _ENCODINGS if raw.startswith(mark)), "utf-8")
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{key}: {path} cannot be read as {error.encoding}: {error.reason}", "Save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror or error}") from None
    if "\0" in text:
        raise DataError(f"{key}: {path} holds NUL characters", "Save it as UTF-8, a name a line.")
    # Excel may say in a first line which character separates columns; the header shows it as well.
    text = re.sub(r"\Asep=.(?=\r|\n)", "", text, flags=re.IGNORECASE)
    try:
        return _columns(text, path, key, faults)
    except csv.Error as error:
        raise DataError(f"{key}: {path} cannot be read: {error}", "Check the quotation marks.") from None


def _columns(text: str, path: Path, key: str, faults: Faults) -> _Table:
    first = next((line for line in re.split(r"[\r\n]", text) if line.strip()), "")
    headers = {mark: [_word(cell) for cell in next(csv.reader([first], delimiter=mark), [])] for mark in _DELIMITERS}
    split = [mark for mark, words in headers.items() if len(words) > 1 and any(word in HEADERS for word in words)]
    if len(split) > 1:
        raise DataError(
            f"{key}: {path}: the header may be separated by {' or by '.join(_DELIMITERS[mark] for mark in split)}",
            "Give the list one column.",
        )
    if split:
        if text.count('"') % 2:
            raise DataError(f"{key}: {path}: a quotation mark stands alone", "Check the quotation marks.")
        return _several(_rows(text, split[0]), headers[split[0]], path, key, faults)
    cells = []
    for line, row in _rows(text, ",") if '"' in text else _lines(text):
        if len(row) > 1:
            faults.add(f"{key}: line {line} has {len(row)} columns, and no header. {_NEED_HEADER}")
        else:
            cells.append((line, row[0]))
    if cells and _word(cells[0][1]) in HEADERS:
        return _Table(HEADERS[_word(cells[0][1])], cells[0][1].strip(), cells[1:])
    return _Table("either", "", cells)


def _several(
    rows: Iterator[tuple[int, list[str]]], words: Sequence[str], path: Path, key: str, faults: Faults
) -> _Table:
    """The best of the columns that a header names."""
    chosen = min((word for word in words if word in HEADERS), key=list(HEADERS).index)
    if words.count(chosen) > 1:
        raise DataError(f"{key}: {path} has {words.count(chosen)} columns {chosen}", "Leave one of them.")
    column, kind = words.index(chosen), HEADERS[chosen]
    cells: list[tuple[int, str]] = []
    aside: list[list[str]] = []
    next(rows)
    for line, row in rows:
        cell = row[column] if column < len(row) else ""
        others = [other.strip() for i, other in enumerate(row) if i != column]
        beside = next((other for other in others if _is_path(other)), None) if kind != "path" else None
        if any(other.strip() for other in row[len(words) :]):
            faults.add(f"{key}: line {line} has {len(row)} columns, and the header {len(words)}")
        elif not cell.strip():
            faults.add(f"{key}: line {line}: the column {chosen} is empty")
        elif beside is not None:
            faults.add(_unclear(key, line, cell, beside))
        else:
            cells.append((line, cell))
            aside.append([other for other in others if other] if kind != "path" else [])
    return _Table(kind, "", cells, aside)


def _unclear(key: str, line: int, cell: str, other: str) -> str:
    return f"{key}: line {line}: {cell} may be an index, and {other} beside it a name; call that one path"


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for row in reader:
        if any(map(str.strip, row)):
            yield reader.line_num, row


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The same where a line is one cell, whatever characters it has."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, [line]


def _word(cell: str) -> str:
    """A header in the form in which it is known."""
    return re.sub(r"[ -]", "_", cell.strip().lower())


def _is_path(cell: str) -> bool:
    return "/" in cell or "\\" in cell or os.path.splitext(cell)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


# -- the images --------------------------------------------------------------------------------------------------------


def _forms(cell: str, root: Path | None) -> list[str]:
    """Names that a cell may mean, the likeliest first: as it stands, tidied, and with slashes for backslashes."""
    bare = cell.strip()
    found = [cell, bare]
    for text in (bare, bare.replace("\\", "/")):
        with contextlib.suppress(DataError):
            found.append(relative(_inside(text, root)))
    return list(dict.fromkeys(found))


def _inside(text: str, root: Path | None) -> str:
    """A path below the root, if it is absolute and leads there; else as it is."""
    if root is None or ".." in text.split("/") or not os.path.isabs(text):  # noqa: PTH117
        return text
    path = posixpath.normpath(text)
    for folder in (os.path.abspath(root), os.path.realpath(root)):  # noqa: PTH100
        start = folder.replace("\\", "/").rstrip("/") + "/"
        if path.startswith(start):
            return path.removeprefix(start)
    return text


def _names(data: Dataset) -> Iterator[str]:
    """Names of the training images, by position, and behind them those of the test images, also held-out ones."""
    return chain(data.train.names, data.held_out.names if data.borrowed else (), data.test.names)


def _matches(cells: Sequence[str], data: Dataset) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """For the number of a cell: positions of the images of exactly this name, and of those by a name without train/.

    Positions are those of `_names`. All names are gone through once, and not kept: a table
    of them would take the memory of the data set.
    """
    wanted: dict[str, list[tuple[int, int]]] = {}
    for i, cell in enumerate(cells):
        for rank, form in enumerate(_forms(cell, data.root)):
            wanted.setdefault(form, []).append((i, rank))
    best: dict[int, tuple[int, set[int]]] = {}
    loose: dict[int, set[int]] = {}

    def note(i: int, rank: int, position: int) -> None:
        known = best.get(i)
        if known is None or rank < known[0]:
            best[i] = (rank, {position})
        elif rank == known[0]:
            known[1].add(position)

    def search(table: dict[str, list[tuple[int, int]]], compose: bool) -> None:
        for position, name in enumerate(_names(data)):
            # A name of ASCII is composed, and was found as it is.
            known = composed(name) if compose else name
            for i, rank in table.get(known, ()):
                note(i, rank + 100 * compose, position)
            folder, _, rest = known.partition("/")
            if rest and folder in (("train",) if position < len(data.train) else _TEST):
                for i, _ in table.get(rest, ()):
                    loose.setdefault(i, set()).add(position)

    if wanted:
        search(wanted, False)
    accented = [form for form in wanted if not form.isascii()]
    if any(i not in best for form in accented for i, _ in wanted[form]):
        forms: dict[str, list[tuple[int, int]]] = {}
        for form in accented:
            forms.setdefault(composed(form), []).extend(pair for pair in wanted[form] if pair[0] not in best)
        search(forms, True)
    return {i: positions for i, (_, positions) in best.items()}, loose


def _position(cell: str, kind: _Kind, named: set[int], loose: set[int], data: Dataset) -> int | None:
    """The image that a cell means; ``None``: there is none.

    Raises:
        DataError: It may mean two, or is an index where there is none.
    """
    is_index = kind != "path" and bool(_INDEX.fullmatch(cell))
    readings = dict.fromkeys(named, "by its name")
    if kind == "index" or not named:
        if kind == "index" and not is_index:
            raise DataError(f"{cell} is no index; call the column path if it holds names")
        # The images of train/0, train/1, ... of a library's data set are no files: there a number is an index.
        if kind != "index" and not (is_index and data.root is None):
            trained = {position for position in loose if position < len(data.train)}
            readings |= dict.fromkeys(trained or loose, "by its name without train/")
        if is_index and data.test_made:
            raise DataError(f"{cell}: where megu makes the test split an index names nothing that lasts")
        if is_index and not 0 <= int(cell) < len(data.train):
            raise DataError(f"{cell} is no index below {len(data.train)}")
        if is_index:
            readings.setdefault(int(cell), "by its index")
    if len(readings) > 1:
        told = [f"{next(islice(_names(data), p, None))} ({why})" for p, why in sorted(readings.items())]
        raise DataError(f"{cell} may be {' or '.join(told)}; write the whole name, or a header path or index")
    return next(iter(readings), None)
