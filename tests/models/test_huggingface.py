"""Directories of transformers: read whole, unlearned, written whole."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import data_set, listing, weights, write_config
from PIL import Image
from safetensors.torch import load_file, save_file

from megu_cli.config import load_config
from megu_cli.config.datasets import DATA_SOURCES
from megu_cli.errors import CheckpointError, ConfigError
from megu_cli.models import class_names, huggingface, sources
from megu_cli.pipeline.context import RunContext

transformers = pytest.importorskip("transformers")


def config_of(kind: str, **given):
    size = {"num_channels": 1, "image_size": 8, "num_labels": 10, **given}
    return {
        "vit": lambda: transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, **size
        ),
        "swin": lambda: transformers.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], patch_size=2, window_size=2, **size
        ),
        "convnext": lambda: transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, **size
        ),
        "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **size),
    }[kind]()


def saved(folder, kind="vit", processor=True, **given):
    """A directory with a randomly initialised model, as save_pretrained() writes it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config_of(kind, **given))
    model.save_pretrained(folder)
    if processor:
        size = {"height": 8, "width": 8}
        transformers.ViTImageProcessor(size=size, image_mean=[0.25], image_std=[0.5]).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "kind", ["vit", "convnext", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("swin", "resnet"))]
)
def test_a_directory_is_unlearned_and_written_as_one(megu, tmp_path, kind):
    original = saved(tmp_path / "mine", kind)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    file = write_config(tmp_path, model={"name": "hf:mine", "preflight": False})
    answer = megu("run", "-c", file)
    assert answer.code == 0, answer.err
    assert "model/ is the unlearned model for from_pretrained()" in answer.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before

    out = tmp_path / "run"
    assert listing(out / "model") == {"config.json", "preprocessor_config.json", "model.safetensors"}
    # It says what was forgotten, wherever it is moved, and also when transformers saves it again.
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(out / "model", tmp_path / "elsewhere" / "v2")
    transformers.AutoModelForImageClassification.from_pretrained(out / "model").save_pretrained(
        tmp_path / "elsewhere" / "v3"
    )
    for name in ("v2", "v3"):
        after = [f"model.name=hf:{tmp_path / 'elsewhere' / name}", "forget.classes=[3]"]
        assert RunContext.open(load_config(file, after)).inputs.request.classes == [3, 8]
    places = (tmp_path / "elsewhere" / "v2", tmp_path / "mine")
    assert len({json.dumps(huggingface.identity(str(place), False)) for place in places}) == 1
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mine", out / "model"))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}
    contract = load_file(out / "model.safetensors")
    assert contract.keys() == new.keys()
    assert all(torch.equal(contract[key], new[key]) for key in new)

    # What a user loads says what megu's model says, and no longer what the original said.
    theirs = transformers.AutoModelForImageClassification.from_pretrained(out / "model").eval()
    assert theirs.config.id2label[3] == "3"  # it had none of its own
    work = RunContext.open(load_config(file))
    x = next(work.inputs.data.test.batches([torch.arange(20)]))
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, work.unlearned()(x), atol=1e-6)
        assert not torch.allclose(theirs(x).logits, original(x).logits, atol=1e-3)
    # Its own processor prepares images as megu does.
    processor = transformers.AutoImageProcessor.from_pretrained(out / "model")
    pixels = work.inputs.data.test.images[0]
    prepared = processor(pixels, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    assert torch.allclose(prepared, x[:1], atol=1e-5)

    # Nothing is computed twice; a file of the directory that was changed is made again.
    assert "running" not in megu("run", "-c", file).err
    (out / "model" / "config.json").write_text("{}")
    assert "finetune: running (corrupt: model/config.json does not have its size)" in megu("run", "-c", file).err
    assert load_file(out / "model" / "model.safetensors").keys() == old.keys()


def test_a_config_alone_is_trained_and_retrained_from_scratch(megu, tmp_path):
    config_of("vit", num_labels=2).save_pretrained(tmp_path / "bare")
    file = write_config(tmp_path, model={"name": "hf:bare"}, eval={"oracle": True})
    answer = megu("run", "-c", file)
    assert answer.code == 0, answer.err
    out = tmp_path / "run"
    states = [load_file(out / name) for name in ("original.safetensors", "oracle.safetensors", "model.safetensors")]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(out / "model").eval()
    assert theirs.config.num_labels == 10
    processor = transformers.AutoImageProcessor.from_pretrained(out / "model")
    assert processor.size["height"] == 8
    # The data set's normalisation, as the processor writes it down.
    assert processor.image_mean == pytest.approx(DATA_SOURCES["digits"].normalisation[0])
    first = weights(out)
    assert megu("run", "-c", file, "-o", tmp_path / "again").code == 0
    assert weights(tmp_path / "again") == first
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == (
        out / "model" / "model.safetensors"
    ).read_bytes()
    # The unlearned directory is one to go on from.
    assert (
        RunContext.open(load_config(file, ["model.name=hf:" + str(out / "model")])).inputs.user_model.checkpoint
        == out / "model"
    )


def test_half_precision_stays(tmp_path, megu):
    saved(tmp_path / "mine", "convnext").half().save_pretrained(tmp_path / "mine")
    file = write_config(tmp_path, model={"name": "hf:mine", "preflight": False})
    assert megu("run", "-c", file).code == 0
    for place in ("model.safetensors", "model/model.safetensors"):
        assert {value.dtype for value in load_file(tmp_path / "run" / place).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"do_normalize": False}, {"mean": (0,), "std": (1,)}),
        ({"do_rescale": False}, {"mean": (0.5 / 255,) * 3, "std": (0.5 / 255,) * 3}),
        ({"rescale_factor": 1 / 127.5}, {"mean": (0.25,) * 3, "std": (0.25,) * 3}),
        ({"do_resize": False}, {"image_size": None, "stretch": False}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            {"crop": 0.875, "stretch": False},
        ),
    ],
)
def test_what_a_processor_says_of_images(tmp_path, given, expected):
    folder = tmp_path / "mine"
    config_of("vit").save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**raw, **given}))
    found = huggingface.preprocessing(str(folder))
    usual = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 224, "stretch": True}
    expected = sources.Preprocessing(**{**usual, **expected})
    assert found.mean == pytest.approx(expected.mean)
    assert found.std == pytest.approx(expected.std)
    for name in ("image_size", "interpolation", "crop", "stretch"):
        assert getattr(found, name) == getattr(expected, name)


def test_a_processor_that_exchanges_channels_is_followed(tmp_path):
    transformers.MobileViTConfig(num_labels=3).save_pretrained(tmp_path)
    transformers.MobileViTImageProcessor().save_pretrained(tmp_path)
    found = huggingface.preprocessing(str(tmp_path))
    assert found.bgr
    assert (found.mean, found.std) == ((0.0,), (1.0,))  # it does not normalise


def test_pictures_are_prepared_as_the_processor_does(tmp_path):
    folder = tmp_path / "mine"
    config_of("convnext", num_channels=3, image_size=32).save_pretrained(folder)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    for split, name in [("train", "a"), ("train", "b"), ("train", "c"), ("test", "a")]:
        place = tmp_path / "images" / split / name
        place.mkdir(parents=True)
        Image.fromarray(picture).resize((90, 60), Image.Resampling.BICUBIC).save(place / "1.png")
    file = write_config(tmp_path, data={"name": "imagefolder", "root": "images", "limit": None},
                        model={"name": "hf:mine"}, forget={"classes": ["a"]})  # fmt: skip
    work = RunContext.open(load_config(file))
    ours = next(work.inputs.data.train.batches([torch.tensor([0])]))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with Image.open(tmp_path / "images" / "train" / "a" / "1.png") as image:
        theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.03  # Pillow and torch resize a little differently
    # The config's own size and normalisation go before the processor's.
    work = RunContext.open(load_config(file, ["data.image_size=16", "model.mean=[0]", "model.std=[1]"]))
    assert work.inputs.data.train.images[0].shape == (3, 16, 16)
    assert work.inputs.data.train.mean.flatten().tolist() == [0, 0, 0]
    assert work.inputs.user_model.preprocessing.crop == 1


def test_classes_are_matched_by_name(tmp_path, megu):
    names = [str(i) for i in (3, 1, 2, 0, 4, 5, 6, 7, 9, 8)]
    labels = dict(enumerate(names))
    saved(tmp_path / "mine", id2label=labels, label2id={name: i for i, name in labels.items()})
    file = write_config(tmp_path, model={"name": "hf:mine"})
    work, plain = RunContext.open(load_config(file)), data_set("digits", limit=400, validation_from="test")
    assert work.inputs.data.classes == work.inputs.data.concepts == names
    assert [names[i] for i in work.inputs.data.train.labels.tolist()] == [str(i) for i in plain.train.labels.tolist()]
    assert work.inputs.data.train.digest != plain.train.digest
    # The same order for a checkpoint that is no directory, by model.classes.
    (tmp_path / "names.txt").write_text("\n".join(names))
    for value in (json.dumps(names), str(tmp_path / "names.txt")):
        same = [f"model.classes={value}", "data.validation_from=test"]
        other = RunContext.open(load_config(write_config(tmp_path), same))
        assert other.inputs.data.train.labels.tolist() == work.inputs.data.train.labels.tolist()


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["cat", "dog", "dog"], ["names occur twice: 'dog'"]),
        (["cat", "dog"], ["id2label has 2 classes, and the data have 3"]),
        (
            ["cat", "dog", "Wolf"],
            ["1 of 3 names are no classes of the data: 'Wolf'", "(the data have, instead: 'e e/l 🐍')"],
        ),
    ],
)
def test_classes_that_do_not_match(names, parts):
    with pytest.raises(CheckpointError) as error:
        class_names.match(names, ["cat", "dog", "e e/l 🐍"], "id2label")
    for part in parts:
        assert part in error.value.message
    assert "model.classes" in error.value.hint


def test_classes_match_though_written_otherwise():
    classes = ["T-shirt/top", "ankle_boot", "🐍"]
    assert class_names.match(["🐍", "Ankle Boot", "t_shirt/top"], classes, "id2label") == [2, 1, 0]
    with pytest.raises(CheckpointError):
        class_names.match(["🐍", "Ankle Boot", "t_shirt/top"], classes, "model.classes", exact=True)
    # Where two names differ by nothing else they are kept apart.
    assert class_names.match(["a_b", "a b"], ["a b", "a_b"], "id2label") == [1, 0]


def test_names_of_classes_in_a_file(tmp_path):
    names = ["an apple", "Zebra/horse", "🐍"]
    files = {
        "a.txt": "\n".join(names),
        "a.json": json.dumps(names),
        "b.json": json.dumps({name: i for i, name in enumerate(names)}),
        "c.json": json.dumps(dict(enumerate(names))),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert class_names.read_names(tmp_path / name) == names, name
    for name, content in {
        "d.json": '{"0": "apple", "2": "Zebra"}',
        "e.json": "3",
        "f.json": "[",
        "g.txt": "\n",
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            class_names.read_names(tmp_path / name)


def test_twelve_thousand_classes_are_matched_at_once():
    names = [f"species {i}" for i in range(12_000)]
    assert class_names.match(names[::-1], names, "id2label") == list(range(12_000))[::-1]


def refused(folder, part, tmp_path, *overrides, error=(ConfigError, CheckpointError)):
    work = RunContext.open(load_config(write_config(tmp_path, model={"name": f"hf:{folder.name}"}), list(overrides)))
    with pytest.raises(error, match=part):
        work.check()
        work.inputs.digest("checkpoint")


def test_directories_that_are_at_fault(tmp_path):
    (tmp_path / "nowhere").mkdir()
    refused(tmp_path / "nowhere", "no config.json", tmp_path)
    saved(tmp_path / "many", num_labels=7)
    refused(tmp_path / "many", "hf:many predicts 7 classes, and the data have 10", tmp_path)
    saved(tmp_path / "larger", image_size=12, processor=False)
    refused(tmp_path / "larger", r"cannot take images of 1 x 8 x 8", tmp_path, "data.image_size=8")
    for key, value, part in (
        ("resample", 77, "resample: 77 is none of 0"),
        ("image_mean", "abc", "preprocessor_config.json holds a value"),
        ("image_std", [0], "a mean or a standard deviation"),
        ("size", {"height": "a", "width": "a"}, "images of 'a' pixels"),
    ):
        saved(tmp_path / "odd")
        path = tmp_path / "odd" / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        refused(tmp_path / "odd", part, tmp_path)
    saved(tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    refused(tmp_path / "cut", "cut cannot be loaded", tmp_path)
    saved(tmp_path / "headless")
    path = tmp_path / "headless" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "classifier" not in k}, path, {"format": "pt"})
    refused(tmp_path / "headless", "missing: classifier.bias", tmp_path)


def test_a_pickle_is_read_for_its_tensors_alone(tmp_path, megu):
    model = saved(tmp_path / "mine")
    state = load_file(tmp_path / "mine" / "model.safetensors")
    (tmp_path / "mine" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "mine" / "pytorch_model.bin")
    work = RunContext.open(load_config(write_config(tmp_path, model={"name": "hf:mine"})))
    assert torch.equal(work.inputs.original.weights["classifier.weight"], model.classifier.weight)

    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").mkdir, ()

    torch.save({**state, "x": Bomb()}, tmp_path / "mine" / "pytorch_model.bin")
    refused(tmp_path / "mine", "holds more than tensors, and was not loaded", tmp_path)
    (tmp_path / "mine" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "mine", "cannot be loaded", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_directory_runs_only_where_it_is_asked_for(tmp_path):
    saved(tmp_path / "mine", processor=False)
    path = tmp_path / "mine" / "config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": auto}))
    (tmp_path / "mine" / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own'\n"
        "class OwnModel(ViTForImageClassification):\n    config_class = OwnConfig\n"
    )
    refused(tmp_path / "mine", "needs code that comes with it; it was not run", tmp_path)
    assert not (tmp_path / "ran").exists()
    file = write_config(tmp_path, model={"name": "hf:mine", "trust_remote_code": True})
    RunContext.open(load_config(file)).check()
    assert (tmp_path / "ran").exists()


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--me--vit"
    saved(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    assert huggingface.folder_of("me/vit").name == "a" * 40
    with pytest.raises(ConfigError, match="is no directory here, not in the local cache"):
        huggingface.folder_of("me/other")


def test_the_users_own_directory_is_never_written_to(megu, tmp_path):
    saved(tmp_path / "run" / "model")
    answer = megu("run", "-c", write_config(tmp_path, model={"name": "hf:run/model", "preflight": False}))
    assert answer.code == 2
    assert "lies in the run directory, where megu writes" in answer.err


def test_class_names_of_any_kind_are_printed_as_they_are(capsys):
    from megu_cli.cli import tables

    names = ["a b", "c/d", "🐍 snake", "[red]not red[/red]", "[/]"]
    tables.stages({"labels": {"mode": "hard", "counts": dict.fromkeys(names, 2), "file": "x"}})
    tables.stages({"similarity": {"rater": "me", "scores": {name: {"[b]": 3.0} for name in names}, "file": "x"}})
    tables.stages({"labels": {"mode": "hard", "counts": {f"class {i}": 1 for i in range(12_000)}, "file": "x"}})
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(name) >= 2
    assert "[b]: 3" in printed
    assert "and 11,960 labels more, of 11,960 images" in printed
    assert printed.count("\n") < 150


@pytest.mark.slow
def test_classes_of_any_name_through_a_run(megu, tmp_path):
    names = ["a b", "c-d", "🐍", "[red]", "é", "#1"]
    draw = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 4)):
        for label, name in enumerate(names):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = draw.integers(0, 90, (8, 8, 3), dtype=np.uint8)
                pixels[label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    order = [names[i] for i in (5, 3, 1, 0, 2, 4)]
    labels = dict(enumerate(order))
    saved(tmp_path / "mine", "convnext", num_channels=3, num_labels=6, processor=False, id2label=labels,
          label2id={name: i for i, name in labels.items()})  # fmt: skip
    ratings = {
        "classes": names,
        "rater": "a test",
        "scores": {"[red]": {n: float(i) for i, n in enumerate(names) if n != "[red]"}},
    }
    (tmp_path / "ratings.json").write_text(json.dumps(ratings))
    file = write_config(tmp_path, data={"name": "imagefolder", "root": "images", "image_size": 8, "limit": None},
                        model={"name": "hf:mine", "preflight": False}, forget={"classes": ["[red]"]},
                        mllm={"ratings": "ratings.json"})  # fmt: skip
    answer = megu("run", "-c", file)
    assert answer.code == 0, answer.err
    assert "class [red] (12 training images" in answer.out
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in labels.items()}
    assert megu("report", "-c", file).code == 0


def test_a_file_of_the_users_in_the_written_directory_is_not_replaced(megu, tmp_path):
    saved(tmp_path / "mine", "vit")
    file = write_config(tmp_path, model={"name": "hf:mine", "preflight": False})
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text('{"mine": 1}')
    answer = megu("run", "-c", file)
    assert answer.code == 2
    assert "config.json" in answer.err
    assert listing(tmp_path / "run") == {"model"}
