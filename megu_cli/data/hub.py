"""Data sets of Hugging Face's ``datasets``, as ``save_to_disk`` leaves them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from megu_cli.data.decode import inspect
from megu_cli.data.images import Raw
from megu_cli.data.names import Names
from megu_cli.data.own import Listing, UserData, assembled, ordered
from megu_cli.data.paths import Root, relative
from megu_cli.errors import DataError, Faults

_TEST = ("test", "validation", "val")


class Rows:
    """Image files in the rows of a table, or named there.

    Args:
        rows: A ``datasets.Dataset`` whose column ``column`` gives ``bytes`` or a ``path``, not decoded.
        column: Of the images.
        names: One for each row.
        root: The folder that paths are relative to.
    """

    def __init__(self, rows: Any, column: str, names: Names, root: Root) -> None:
        self.rows, self.column, self.names, self.root = rows, column, names, root

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> tuple[str, bytes]:
        """Name and bytes of an image file.

        Raises:
            DataError: There are none, or they lie outside the root.
        """
        cell, name = self.rows[position][self.column] or {}, self.names[position]
        if cell.get("bytes"):
            return name, bytes(cell["bytes"])
        if not cell.get("path"):
            raise DataError(f"{name} holds no image")
        path = relative(cell["path"].removeprefix(f"{self.root.path}/"))
        if fault := self.root.outside(path):
            raise DataError(fault)
        try:
            return name, Path(self.root.path, path).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: {path} cannot be read: {error.strerror}") from None

    def at(self, index: np.ndarray[Any, Any]) -> Rows:
        """The rows at positions."""
        return Rows(self.rows.select(index), self.column, self.names.at(index), self.root)


def hf_dataset(user: UserData) -> Raw:
    """The data set in ``root``: with the splits ``train`` and ``test`` (or ``validation``), or with one made here.

    The column of images is told by its feature, that of labels by a ``ClassLabel`` or the name ``label`` or
    ``labels``; a column ``subject`` says whose image it is. Arrow tables and JSON are read: no code is run.

    Raises:
        DataError: The package is not installed, there is no such data set, or images are at fault.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data.name: hf_dataset needs the package datasets", "Install it with: pip install 'megu-cli[datasets]'"
        ) from None
    if user.settings.root is None:
        raise DataError("data.name: hf_dataset needs data.root")
    root = Root(user.settings.root, user.settings.follow_links)
    try:
        found = datasets.load_from_disk(root.path)
    except Exception as error:  # whatever datasets, pyarrow and json raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{root.path} is no data set of Hugging Face's save_to_disk: {reason}") from None
    rows, sides = _joined(root, found, datasets)
    columns = _columns(root, rows)
    rows = rows.cast_column(columns["image"], datasets.Image(decode=False))

    feature = rows.features[columns["label"]]
    known = getattr(feature, "names", None)
    values = rows[columns["label"]]
    faults = Faults(f"rows of {root.path} have no label")
    for row, v in enumerate(values):
        # A ClassLabel of -1 is how a published test split keeps its labels to itself.
        if v is None or (known and not 0 <= v < len(known)):
            faults.add(f"row {row}: {columns['label']} is {v}")
    faults.check()
    labels = [known[v] if known else str(v) for v in values]
    classes, position = ordered(dict.fromkeys(labels), user.classes or known, numeric=True)
    people: dict[str, int] = {}
    whose = None
    if "subject" in columns:
        ids = ["" if v is None else str(v) for v in rows[columns["subject"]]]
        whose = np.array([people.setdefault(v, len(people)) if v else -1 for v in ids], dtype=np.int64)
    counted = ((side, i) for side, number in sides for i in range(number))
    names = Names.of(f"{side}/{i}" for side, i in counted)
    test = np.repeat([side == sides[-1][0] for side, _ in sides], [number for _, number in sides])
    listing = Listing(
        names,
        np.array([position[label] for label in labels], dtype=np.int64),
        test if len(sides) == 2 else None,
        whose,
        list(people),
    )
    source = Rows(rows, columns["image"], names, root)
    return assembled(root.path, classes, listing, _digests(source), source, user)


def _joined(root: Root, found: Any, datasets: Any) -> tuple[Any, list[tuple[str, int]]]:
    """All rows as one table, and (split, rows) in its order."""
    if not isinstance(found, datasets.DatasetDict):
        return found, [("row", len(found))]
    if "train" not in found:
        raise DataError(f"{root.path} has no split train; it has {', '.join(found)}")
    other = next((name for name in _TEST if name in found), None)
    sides = ["train", other] if other else ["train"]
    rows = datasets.concatenate_datasets([found[side] for side in sides])
    return rows, [(side, len(found[side])) for side in sides]


def _columns(root: Root, rows: Any) -> dict[str, str]:
    """Names of the columns ``image``, ``label`` and, where there is one, ``subject``."""
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    image = [name for name, kind in kinds.items() if kind == "Image"]
    label = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    label = label or [name for name in ("label", "labels") if name in kinds]
    if len(image) != 1 or len(label) != 1:
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError(
            f"{root.path} has {len(image)} columns of images and {len(label)} of labels, not one of each ({shown})",
            "Remove the others with remove_columns, or name the column of labels label.",
        )
    return {"image": image[0], "label": label[0], **({"subject": "subject"} if "subject" in kinds else {})}


def _digests(source: Rows) -> np.ndarray[Any, Any]:
    """(N, 32) sha256 of all image files."""
    faults = Faults("images cannot be used")
    digests = np.zeros((len(source), 32), np.uint8)
    for position in range(len(source)):
        try:
            name, content = source.read(position)
            inspect(name, content)
            digests[position] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
        except DataError as error:
            faults.add(error.message)
    faults.check("Repair them or take them out of the data.")
    return digests
