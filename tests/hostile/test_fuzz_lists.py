"""Deletion lists and manifests: what is forgotten is what the writer of the list meant, or the run is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_config
from hypothesis import strategies as st

from .conftest import CLASSES, PHOTOS, photo, ratings
from .harness import call, fresh, fuzz
from .material import damaged, texts

# In the order of the positions that an index means: split by split, class by class, file by file.
TRAINED = [f"{name}/{k}.png" for name in CLASSES for k in range(5)]
# A manifest whose files have the names that lists are often misread by.
ODD = ("5", "8", "a.png", "train/a.png", "b,c.png", "d e.png", "'f'.png", "g;h.png", "train/i.png", "ä.png", "#j.png")
HEADERS = (None, None, "path", "index", "file", "filename", "name", "Path", "image", "label", "sample", "x")
LAYOUTS = ("bare", "bare", "pandas", "numbered", "labelled", "label first", "empty first")
SEPARATORS = (",", ",", ";", "\t", "|", " ")
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "utf-32")


@pytest.fixture(scope="module")
def seen() -> Iterator[list[tuple[set[str], set[str]]]]:
    """(forgotten, forgotten earlier) as names of files, for each request that is resolved."""
    from megu_cli.request import resolve as forget

    found: list[tuple[set[str], set[str]]] = []
    resolve = forget.resolve

    def noting(data: Any, *arguments: Any, **options: Any) -> Any:
        request = resolve(data, *arguments, **options)
        names = list(data.train.names)
        found.append(({names[i] for i in request.forget}, {names[i] for i in request.already}))
        return request

    patch = pytest.MonkeyPatch()
    patch.setattr(forget, "resolve", noting)
    yield found
    patch.undo()


@dataclass(frozen=True)
class Written:
    """A deletion list as somebody's tool writes it, and the images that this somebody means."""

    content: bytes
    meant: frozenset[str]


@st.composite
def lists(draw: st.DrawFn, names: list[str], indices: bool, form: Any) -> Written:
    """A list of some of these names; with ``indices``, of positions in place of names where that is drawn."""
    chosen = draw(st.lists(st.sampled_from(range(len(names))), min_size=1, max_size=3, unique=True))
    by_index = indices and draw(st.integers(0, 4)) == 0
    cells = [str(i) if by_index else form(draw, names[i]) for i in chosen]
    header = draw(st.sampled_from((None, "index") if by_index else HEADERS))
    # A position beside another number can be meant either way: who writes positions writes them alone, or first.
    layout = draw(st.sampled_from(("bare", "labelled") if by_index else LAYOUTS))
    rows = [_row(layout, number, cell) for number, cell in enumerate(cells)]
    if header is not None:
        rows.insert(0, _row(layout, -1, header))
    for row in draw(st.lists(st.sampled_from(([], [""], ["", ""], ["# why"], ["total", "2"])), max_size=1)):
        rows.insert(draw(st.integers(0, len(rows))), row)
    stream = io.StringIO()
    quoting = draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE)))
    options = {"escapechar": "\\"} if quoting == csv.QUOTE_NONE else {}
    end = draw(st.sampled_from(("\n", "\n", "\r\n", "\r")))
    writer = csv.writer(
        stream, delimiter=draw(st.sampled_from(SEPARATORS)), quoting=quoting, lineterminator=end, **options
    )
    if quoting == csv.QUOTE_NONE:
        rows = [row for row in rows if row != [""]]  # which the writer refuses
    writer.writerows(rows)
    text = stream.getvalue()
    text = text.rstrip("\r\n") if draw(st.booleans()) else text
    extra = draw(st.sampled_from(("", "", "", "", "\x00", '"', "\n\n\n", " ", "\x1a")))
    encoding = draw(st.sampled_from(ENCODINGS))
    return Written((text + extra).encode(encoding, "replace"), frozenset(names[i] for i in chosen))


def _row(layout: str, number: int, cell: str) -> list[str]:
    top = number < 0
    return {
        "bare": [cell],
        "pandas": ["" if top else str(number), cell],
        "numbered": ["index" if top else str(number), cell],
        "labelled": [cell, "label" if top else "cat"],
        "label first": ["label" if top else "cat", cell],
        "empty first": ["", cell],
    }[layout]


def in_folders(draw: st.DrawFn, name: str) -> str:
    """A file's name as people write it who list their folders."""
    forms = (name, name, f"./{name}", f"train/{name}", name.replace("/", "\\"), f" {name} ", f"/home/x/{name}")
    odd = (
        f".\\train\\{name}",
        f"C:\\x\\{name}",
        f"'{name}'",
        name.upper(),
        f"{name}/",
        f"x/../{name}",
        f"photos/{name}",
    )
    return draw(st.sampled_from(forms + odd))


def exactly(draw: st.DrawFn, name: str) -> str:
    """A file's name as the manifest has it."""
    return draw(st.sampled_from((name, name, f"./{name}")))


def judge(code: int, meant: frozenset[str], found: list[tuple[set[str], set[str]]], earlier: bool = False) -> None:
    """What is forgotten (or was, ``earlier``) is what was meant, or the call was refused."""
    if code == 0:
        assert found, "neither refused nor resolved"
        taken = (
            {name.removeprefix("train/") for name in found[-1][earlier]} if meant <= {*TRAINED} else found[-1][earlier]
        )
        assert taken == set(meant), f"{sorted(taken)} are forgotten where {sorted(meant)} were meant"


@fuzz(written=lists(TRAINED, True, in_folders), earlier=st.integers(0, 3))
def test_lists_of_files_in_folders(photos: Path, seen: list[Any], written: Written, earlier: int) -> None:
    (photos / "list.csv").write_bytes(written.content)
    before = earlier == 0
    request = {"random": {"count": 1}, "already": ["list.csv"]} if before else {"samples": "list.csv"}
    write_config(photos, **{**PHOTOS, "forget": request, "out": "none"})
    seen.clear()
    answer = call("similarity", "--dry-run", "-c", photos / "megu.yaml", user=photos, run=photos / "none")
    judge(answer.code, written.meant, seen, before)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of files with odd names, without a test split for the first half of its lines."""
    folder = tmp_path_factory.mktemp("odd")
    names = [*ODD, *(f"{k}.png" for k in range(9))]
    for seed, name in enumerate([*names, "test/0.png", "test/1.png"]):
        photo(folder / f"{name}.png", seed).rename(folder / name)
    with (folder / "table.csv").open("w", newline="") as stream:
        rows = [[name, CLASSES[i % 2], "train"] for i, name in enumerate(names)]
        csv.writer(stream).writerows(
            [["path", "label", "split"], *rows, ["test/0.png", "cat", "test"], ["test/1.png", "dog", "test"]]
        )
    ratings(folder / "ratings.json", CLASSES[:2])
    data = {**PHOTOS["data"], "name": "manifest", "manifest": "table.csv", "root": None}
    write_config(folder, **{**PHOTOS, "data": data, "forget": {"samples": "list.csv"}, "out": "none"})
    return folder


@fuzz(written=lists(list(ODD), False, exactly))
def test_lists_of_odd_names(odd: Path, seen: list[Any], written: Written) -> None:
    (odd / "list.csv").write_bytes(written.content)
    seen.clear()
    answer = call("similarity", "--dry-run", "-c", odd / "megu.yaml", user=odd, run=odd / "none")
    judge(answer.code, written.meant, seen)


LINES = st.lists(
    st.tuples(
        st.sampled_from([f"train/{name}" for name in TRAINED]) | texts(),
        st.sampled_from(CLASSES) | texts(),
        st.sampled_from(("train", "train", "test")) | texts(),
        st.sampled_from(("", "p1", "p2")) | texts(),
    ),
    max_size=4,
)


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """A manifest of the photos with a few odd lines, another header, another encoding, or damage."""
    rows = [(f"train/{name}", name[:3], "train", "") for name in TRAINED]
    rows += [(f"test/{name}", name[:3], "test", "") for name in TRAINED[::3]]
    rows += draw(LINES)
    columns = draw(st.permutations(("path", "label", "split", "subject"))) if draw(st.booleans()) else None
    header = list(columns or ("path", "label", "split", "subject"))
    if draw(st.integers(0, 4)) == 0:
        header[draw(st.integers(0, 3))] = draw(texts())
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=draw(st.sampled_from((",", ",", ",", ";", "\t"))))
    order = [
        ("path", "label", "split", "subject").index(name) for name in columns or ("path", "label", "split", "subject")
    ]
    writer.writerows([header, *([row[i] for i in order] for row in rows)])
    content = stream.getvalue().encode(draw(st.sampled_from(ENCODINGS)), "replace")
    return draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


@fuzz(content=manifests(), chosen=st.lists(st.sampled_from(TRAINED), min_size=1, max_size=3, unique=True))
def test_manifests(photos: Path, seen: list[Any], content: bytes, chosen: list[str]) -> None:
    (photos / "table.csv").write_bytes(content)
    (photos / "list.csv").write_text("".join(f"train/{name}\n" for name in chosen))
    data = {**PHOTOS["data"], "name": "manifest", "manifest": "table.csv"}
    write_config(photos, **{**PHOTOS, "data": data, "forget": {"samples": "list.csv"}, "out": "none"})
    seen.clear()
    answer = call("similarity", "--dry-run", "-c", photos / "megu.yaml", user=photos, run=photos / "none")
    judge(answer.code, frozenset(chosen), seen)
    assert str(photos / "secret.png") not in answer.opened
    assert "/etc/passwd" not in answer.opened


LABELS = st.lists(texts(), min_size=3, max_size=4, unique=True)


@fuzz(labels=LABELS, show=st.integers(0, 19))
def test_class_names(photos: Path, seen: list[Any], labels: list[str], show: int) -> None:
    table = photos / "table.csv"
    rows = [[f"train/{name}", labels[i // 5 % 3], "train"] for i, name in enumerate(TRAINED)]
    rows += [[f"test/{name}", labels[i // 5 % 3], "test"] for i, name in enumerate(TRAINED)]
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["path", "label", "split"], *rows])
    ratings(photos / "odd.json", tuple(labels[:3]))
    data = {**PHOTOS["data"], "name": "manifest", "manifest": "table.csv"}
    config = {**PHOTOS, "data": data, "forget": {"classes": [labels[0]]}, "out": "named"}
    write_config(photos, **{**config, "mllm": {"ratings": "odd.json"}})
    run = photos / "named"
    fresh(run)
    seen.clear()
    # The figure takes most of the time, so that not every case draws it.
    more = ["--show"] if show == 0 else ["--json"] if show == 1 else []
    answer = call("similarity", "-c", photos / "megu.yaml", *more, user=photos, run=run, writes=True)
    judge(answer.code, frozenset(TRAINED[:5]), seen)
    if answer.code == 0:
        scores = json.loads((run / "similarity.json").read_text(encoding="utf-8"))["scores"]
        assert list(scores) == [labels[0].strip()]
    fresh(run)


def test_the_configs_of_this_file_are_ones(photos: Path, odd: Path) -> None:
    # Otherwise every case would be refused, and nothing be tested.
    for folder, name in ((photos, TRAINED[0]), (odd, ODD[3])):
        (folder / "list.csv").write_text(f"{name}\n")
        if folder is photos:
            write_config(photos, **{**PHOTOS, "forget": {"samples": "list.csv"}, "out": "none"})
        assert yaml.safe_load((folder / "megu.yaml").read_text())["forget"] == {"samples": "list.csv"}
        answer = call("similarity", "--dry-run", "-c", folder / "megu.yaml", user=folder, run=folder / "none")
        assert answer.code == 0, answer.err
