"""Deletion lists as people write them, and requests one after another on models that are moved and renamed."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import Megu, refused, write_config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from megu_cli.config import load_config
from megu_cli.models.marks import MARK, weights_digests
from megu_cli.pipeline.context import RunContext

CLASSES = ("cat", "dog", "eel")
WANTED = ["train/cat/1.png", "train/eel/2.png"]


def pictures(root: Path, train: int = 6, test: int = 4) -> Path:
    """train/CLASS/N.png and test/CLASS/N.png, each image different, each class with a bright column of its own."""
    draw = torch.Generator().manual_seed(0)
    for split, number in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(0, 90, (8, 8, 3), generator=draw, dtype=torch.uint8)
                pixels[:, 2 * label + 1] = 240
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


def asked(folder: Path, root: Path, content: bytes, suffix: str = "csv", **data: object) -> RunContext:
    """A request for the images of a list."""
    folder.mkdir(exist_ok=True)
    (folder / f"list.{suffix}").write_bytes(content)
    settings = {"name": "imagefolder", "root": str(root), "image_size": 8, "limit": None, **data}
    return RunContext.open(load_config(write_config(folder, data=settings, forget={"samples": f"list.{suffix}"})))


def forgotten(work: RunContext) -> list[str]:
    return [work.inputs.data.train.names[i] for i in work.inputs.request.forget.tolist()]


# How it is written -> its bytes, and what is said where it is refused. ROOT is the absolute path of the images.
WAYS: dict[str, tuple[bytes, str | None]] = {
    "names alone": (b"cat/1.png\neel/2.png\n", None),
    "names with train/": (b"train/cat/1.png\ntrain/eel/2.png", None),
    "pandas' to_csv": (b",path\n0,cat/1.png\n7,eel/2.png\n", None),
    "pandas, index=False": (b"path\ncat/1.png\neel/2.png\n", None),
    "pandas, index_label": (b"index,path\n0,cat/1.png\n1,eel/2.png\n", None),
    "pandas, header=False": (b"0,cat/1.png\n1,eel/2.png\n", "Several columns need a header"),
    "pandas, another header": (b",photo\n0,cat/1.png\n1,eel/2.png\n", "Several columns need a header"),
    "an index beside another header": (b"index,photo\n0,cat/1.png\n1,eel/2.png\n", "call that one path"),
    "an index alone": (b"index\n1\n14\n", None),
    "Excel with ; and BOM": (b"\xef\xbb\xbfDateiname;File;Grund\r\nx;cat/1.png;a, b\r\ny;eel/2.png;\r\n;;\r\n", None),
    "Excel with sep=": (b"sep=;\r\npath;why\r\ncat/1.png;x\r\neel/2.png;y\r\n", None),
    "tabs": (b"path\tlabel\ncat/1.png\tcat\neel/2.png\teel\n", None),
    "PowerShell's UTF-16": ("\ufeffcat/1.png\r\neel/2.png\r\n".encode("utf-16-le"), None),
    "UTF-16 without BOM": ("cat/1.png\r\neel/2.png\r\n".encode("utf-16-le"), "holds NUL"),
    "Latin-1": ("cat/é.png\n".encode("latin-1"), "cannot be read as utf-8"),
    "find with ./": (b"./cat/1.png\n./eel/2.png\n", None),
    "find from elsewhere": (b"images/train/cat/1.png\n", "is no image of the data"),
    "Windows' backslashes": (b"cat\\1.png\r\n.\\train\\eel\\2.png\r\n", None),
    "Windows' drives": (b"C:\\images\\train\\cat\\1.png\r\n", "is no image of the data"),
    "quoted": (b'"cat/1.png"\n"eel/2.png"\n', None),
    "Export-Csv": (b'"FullName","Length"\r\n"cat\\1.png","9"\r\n"eel\\2.png","9"\r\n', None),
    "absolute": (b"ROOT/train/cat/1.png\nROOT/train/eel/2.png\n", None),
    "absolute and elsewhere": (b"/elsewhere/train/cat/1.png\n", "is no image of the data"),
    "climbing": (b"dog/../cat/1.png\n", "is no image of the data"),
    "another case": (b"Cat/1.png\neel/2.PNG\n", "is no image of the data"),
    "an empty first cell": (b",cat/1.png\n", "Several columns need a header"),
    "an empty path": (b"path,why\n,cat\neel/2.png,x\n", "the column path is empty"),
    "more columns than headers": (b"path,why\ncat/1.png,x,dog/1.png\n", "has 3 columns"),
    "one column twice": (b"path,path\ncat/1.png,dog/1.png\n", "2 columns path"),
    "a quotation mark that is not closed": (b'"cat/1.png\neel/2.png\n', "cannot be read"),
    "the same image twice": (b"cat/1.png\n./train/cat/1.png\n", "stands in line 1 already"),
    "a test image": (b"test/cat/1.png\n", "is a test image"),
    "old Macs": (b"cat/1.png\reel/2.png\r", None),
    "empty lines": (b"\n\ncat/1.png\n\n  \neel/2.png\n\n", None),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("way", WAYS)
def test_a_list_is_read_right_or_refused(megu: Megu, images, tmp_path, way):
    content, fault = WAYS[way]
    work = asked(tmp_path, images, content.replace(b"ROOT", str(images).encode()))
    if fault is None:
        assert forgotten(work) == WANTED
        assert work.inputs.notes[0] == "forget.samples: 2 of 2 lines matched, 2 images with copies"
    else:
        refused(megu("run", "-c", tmp_path / "megu.yaml"), fault)
        refused(megu("run", "-c", tmp_path / "megu.yaml", "--dry-run"), fault)


def manifest(folder: Path, names: list[str]) -> Path:
    """A manifest of images under these names, every third of a class; the last three are test images."""
    draw = torch.Generator().manual_seed(0)
    lines = ["path,label,split"]
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file, format="png")
        lines.append(f'"{name}",{CLASSES[i % 3]},{"test" if i >= len(names) - 3 else "train"}')
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("5\n8\n", ["5", "8"]),
        ("path\n5\n8\n", ["5", "8"]),
        ("0\n", ["train/a.png"]),
        ("index\n0\n2\n", ["train/a.png", "5"]),
        ("index\n5\n", "may be"),
        ("path\n0\n", "is no image of the data"),
        ("a.png\n", ["a.png"]),
        ("./a.png\n", ["a.png"]),
        ("train/a.png\n", ["train/a.png"]),
        ("3\n", "may be b, c.png .by its index. or train/3 .by its name without train"),
        ("b, c.png\n", ["b, c.png"]),
        ('path,why\n"b, c.png",x\n', ["b, c.png"]),
        ("e\u0301.png\n", ["\u00e9.png"]),
        ("path\n", "the forget set is empty"),
        ("99999999999999999999\n", "is no image of the data"),
        ("index,label\n0,8\n", "call that one path"),
        ("5\n2\n", "2 is no name, and other lines are"),
        ('index,label\n0,8"', "a quotation mark stands alone"),
    ],
)
def test_an_exact_name_wins_and_what_may_be_two_is_refused(tmp_path, content, wanted):
    names = ["train/a.png", "a.png", "5", "b, c.png", "8", "train/3", *(f"d{i}.png" for i in range(6)), "\u00e9.png"]
    table = manifest(tmp_path / "images", [*names, "x.png", "y.png", "z.png"])
    settings = {"name": "manifest", "manifest": str(table)}
    work = asked(tmp_path / "asked", table.parent, content.encode(), **settings)
    if isinstance(wanted, list):
        assert forgotten(work) == wanted
    else:
        with pytest.raises(Exception, match=wanted):
            _ = work.inputs.request


def test_what_is_listed_is_in_no_test_split_made_here_however_it_is_written(images, tmp_path):
    root = images / "train"
    names = [f"{label}/{i}.png" for label in CLASSES for i in range(4)]
    for way in ("{}", "./{}", f"{root}/{{}}"):
        content = "\n".join(way.format(name) for name in names)
        assert forgotten(asked(tmp_path, root, content.encode())) == names
    windows = "\n".join(name.replace("/", "\\") for name in names)
    assert forgotten(asked(tmp_path, root, windows.encode())) == names


def test_the_dry_run_names_what_would_be_forgotten(megu, images, tmp_path):
    asked(tmp_path, images, b"\n".join(b"dog/%d.png" % i for i in range(6)))
    told = megu("run", "-c", tmp_path / "megu.yaml", "--dry-run", "--json").json
    assert told["forget"] == {"images": 6, "first": [f"train/dog/{i}.png" for i in range(5)]}
    assert told["notes"][0] == "forget.samples: 6 of 6 lines matched, 6 images with copies"
    answer = " ".join(megu("run", "-c", tmp_path / "megu.yaml", "--dry-run").out.split())
    assert "6 training images would be forgotten: train/dog/0.png, train/dog/1.png" in answer


@pytest.mark.parametrize("lines", ["Cat/1.png", "path;why\ncat/none.png;x", "/elsewhere/cat/1.png", "gone\\1.png"])
def test_earlier_lists_that_match_nothing_are_refused_unless_told_otherwise(images, tmp_path, lines):
    work = asked(tmp_path, images, b"dog/0.png\n")
    (tmp_path / "earlier.csv").write_text(lines)
    settings = [f"forget.already=[{tmp_path / 'earlier.csv'}]"]
    with pytest.raises(Exception, match="is no image of the data") as error:
        _ = RunContext.open(load_config(tmp_path / "megu.yaml", settings)).inputs.request
    assert "forget.already_missing: ignore" in str(error.value)
    work = RunContext.open(load_config(tmp_path / "megu.yaml", [*settings, "forget.already_missing=ignore"]))
    assert forgotten(work) == ["train/dog/0.png"]
    assert "forget.already: 0 of 1 lines of earlier.csv matched" in work.inputs.notes


# -- one request after another ---------------------------------------------------------------------------------------

MODULE = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))
"""


def network() -> nn.Module:
    scope: dict = {}
    exec(MODULE, scope)
    torch.manual_seed(0)
    return scope["make"]()


def request(folder: Path, images: Path, checkpoint: Path, lines: str, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(MODULE)
    (folder / "list.csv").write_text(lines)
    scores = {a: {b: 5 for b in CLASSES if b != a} for a in CLASSES}
    (folder / "ratings.json").write_text(json.dumps({"rater": "me", "classes": list(CLASSES), "scores": scores}))
    return write_config(
        folder,
        data={"name": "imagefolder", "root": str(images), "image_size": 8, "limit": None},
        model={"name": "python:net:make", "checkpoint": str(checkpoint), "preflight": False},
        mllm={"ratings": "ratings.json"},
        forget=more.pop("forget", {"samples": "list.csv"}),
        finetune={"epochs": 1, "retain_fraction": 1, "batch": 8, "forget_batch": 4},
        **more,
    )


def before(file: Path, *settings: str) -> set[str]:
    work = RunContext.open(load_config(file, list(settings)))
    return {work.inputs.data.train.names[i] for i in work.inputs.request.already.tolist()}


def unlearn(megu: Megu, file: Path, command: str = "run") -> None:
    stages = ["similarity", "labels", "noise", "finetune"] if command == "run" else [command]
    for stage in stages:
        answer = megu(stage, "-c", file, "-q")
        assert answer.code == 0, answer.err


@pytest.mark.parametrize("wrapped", [True, False])
def test_three_requests_each_from_the_last_ones_moved_and_renamed_file(megu, tmp_path, wrapped):
    images = pictures(tmp_path / "images")
    state = network().state_dict()
    torch.save({"epoch": 3, "model": state} if wrapped else state, tmp_path / "v1.pth")
    asked_for = ["cat/1.png", "dog/2.png", "eel/3.png"]
    out = tmp_path / "work"
    for number, name in enumerate(asked_for, 1):
        file = request(out, images, tmp_path / f"v{number}.pth", name)
        assert before(file) == {f"train/{earlier}" for earlier in asked_for[: number - 1]}
        if number == 3:  # the photo of the first request is really deleted, and comes back later
            photo = images / "train" / asked_for[0]
            kept = photo.read_bytes()
            photo.unlink()
        unlearn(megu, file)
        # It is moved and renamed, and the run directory is used again.
        result = torch.load(out / "run" / "model.pth", weights_only=True)
        network().load_state_dict(result["model"] if wrapped else result, strict=True)
        (out / "run" / "model.pth").rename(tmp_path / f"v{number + 1}.pth")
    photo.write_bytes(kept)
    fourth = request(tmp_path / "else", images, tmp_path / "v4.pth", "cat/5.png")
    assert before(fourth) == {f"train/{name}" for name in asked_for}
    assert any("these stay forgotten: 3 images" in note for note in RunContext.open(load_config(fourth)).inputs.notes)
    assert before(fourth, "forget.already=[]") == set()
    (tmp_path / "else" / "more.csv").write_text("eel/0.png")
    joined = before(fourth, f"forget.already=[{tmp_path / 'else' / 'more.csv'}]")
    assert joined == {f"train/{name}" for name in [*asked_for, "eel/0.png"]}


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run that forgot cat/1.png of a .pth and a .safetensors; not to be changed."""
    from megu_cli.pipeline.engine import Pipeline

    folder = tmp_path_factory.mktemp("unlearned")
    images = pictures(folder / "images")
    torch.save(network().state_dict(), folder / "mine.pth")
    config = load_config(request(folder / "first", images, folder / "mine.pth", "cat/1.png"))
    config.out.mkdir()
    Pipeline(RunContext.open(config)).run(goals=["finetune"])
    return folder


def test_every_file_says_what_was_forgotten_in_the_same_bytes(unlearned, tmp_path):
    from megu_cli.pipeline.engine import Pipeline

    run = unlearned / "first" / "run"
    body = json.loads((run / "finetune.json").read_text())
    with safe_open(run / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()[MARK])
    assert record == body["provenance"]
    assert record["forgotten"] == body["forgotten"]
    assert len(record["forgotten"]["images"]) == 1
    assert "cat" not in json.dumps(record)
    assert {record["tensors"]} == weights_digests(run / "model.safetensors") == weights_digests(run / "model.pth")
    assert {record["parent"]} == weights_digests(unlearned / "mine.pth")
    config = load_config(request(tmp_path, unlearned / "images", unlearned / "mine.pth", "cat/1.png"))
    config.out.mkdir()
    Pipeline(RunContext.open(config)).run(goals=["finetune"])
    for name in ("model.pth", "model.safetensors"):
        assert (config.out / name).read_bytes() == (run / name).read_bytes()


def test_what_other_code_saved_again_is_known_by_its_weights(unlearned, tmp_path):
    images, run = unlearned / "images", unlearned / "first" / "run"
    state = load_file(run / "model.safetensors")
    renamed = OrderedDict((f"module.{name}", value) for name, value in state.items())
    torch.save({"state_dict": renamed, "optimizer": {"step": 3}}, tmp_path / "again.pth")
    save_file(state, tmp_path / "again.safetensors")
    for name in ("again.pth", "again.safetensors"):
        there = request(tmp_path / "next", images, tmp_path / name, "dog/1.png", out=str(run))
        assert before(there) == {"train/cat/1.png"}
    # A model that was trained since is another, of which nothing is known.
    state["5.bias"] += 1
    save_file(state, tmp_path / "again.safetensors")
    assert before(there) == set()


def test_a_damaged_record_is_refused_with_what_to_name(megu, unlearned, tmp_path):
    images, run = unlearned / "images", unlearned / "first" / "run"
    for mark in ("{", "[]", json.dumps({"forgotten": {"concepts": [], "images": []}, "checksum": "0"})):
        save_file(load_file(run / "model.safetensors"), tmp_path / "odd.safetensors", {MARK: mark})
        file = request(tmp_path / "next", images, tmp_path / "odd.safetensors", "dog/1.png")
        refused(megu("run", "-c", file), "its record of what was forgotten is damaged", "Set forget.already to")
        assert before(file, f"forget.already=[{run}]") == {"train/cat/1.png"}
        assert before(file, "forget.already=[]") == set()


def test_a_flipped_bit_in_the_record_of_a_pth_is_refused(megu, unlearned, tmp_path):
    content = bytearray((unlearned / "first" / "run" / "model.pth").read_bytes())
    content[content.index(b'"forgotten"') + 15] ^= 1
    (tmp_path / "odd.pth").write_bytes(content)
    file = request(tmp_path / "next", unlearned / "images", tmp_path / "odd.pth", "dog/1.png")
    refused(megu("run", "-c", file), "its record of what was forgotten is damaged")


def test_init_leaves_already_to_the_checkpoint(megu, unlearned, tmp_path):
    file = tmp_path / "megu.yaml"
    model = unlearned / "first" / "run" / "model.pth"
    assert megu("init", "-c", file, "--images", unlearned / "images", "--checkpoint", model, "--class", "cat").code == 0
    assert "#   already: null" in file.read_text()
