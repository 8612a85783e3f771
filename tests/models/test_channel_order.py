"""`model.channel_order: bgr`: a model that was trained on images as OpenCV reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from megu_cli import data
from megu_cli.config import DataConfig, ModelConfig, load_config
from megu_cli.data import MemoryImages, Preprocessing, Split
from megu_cli.models.networks import BUILTIN
from megu_cli.models.user_model import UserModel
from megu_cli.pipeline.context import RunContext

MEAN, STD = [0.1, 0.2, 0.6], [0.2, 0.25, 0.3]
NAMES = ["blue", "green", "red"]
# Of a red image more than of a blue one, so that exchanged colours are another class.
TINTS = {"red": (200, 90, 30), "green": (30, 200, 60), "blue": (30, 90, 200)}


def split(channels: int, bgr: bool) -> Split:
    pixels = torch.arange(2 * channels * 4).view(2, channels, 2, 2).byte() * 9
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    none = torch.zeros(2, dtype=torch.int64)
    return Split(MemoryImages(pixels), none, none, ["a", "b"], mean, std, "x", bgr=bgr)


def test_the_input_is_as_opencv_and_the_usual_normalisation_make_it():
    images = split(3, bgr=True)
    (x,) = images.batches([torch.tensor([1])])
    read = images.images[1].permute(1, 2, 0).numpy()[:, :, ::-1]  # what cv2.imread gives
    assert np.allclose(x[0].permute(1, 2, 0), (read / 255 - MEAN) / STD, atol=1e-6)


def test_grey_images_are_the_same_either_way():
    (one,), (other,) = (split(1, bgr).batches([torch.tensor([0, 1])]) for bgr in (False, True))
    assert one.equal(other)


def model(**settings) -> UserModel:
    return UserModel(ModelConfig(name="small_resnet", **settings), DataConfig(name="cifar10"))


def test_only_bgr_changes_the_key_of_a_stage():
    assert model(channel_order="rgb").architecture == model().architecture == "small_resnet"
    assert model(channel_order="bgr").architecture == {"model": "small_resnet", "channel_order": "bgr"}


def test_a_normalisation_of_the_config_is_in_the_models_order_and_others_follow_their_colour(tmp_path):
    assert model(channel_order="bgr", mean=MEAN, std=STD).preprocessing.mean == tuple(MEAN)
    own = Preprocessing(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert own.ordered(bgr=True) == Preprocessing(mean=(3.0, 2.0, 1.0), std=(6.0, 5.0, 4.0), bgr=True)
    photos(tmp_path / "photos", 2)
    settings = DataConfig(name="imagefolder", root=tmp_path / "photos", image_size=8)
    one, other = (data.load(settings, Preprocessing(bgr=bgr)).train for bgr in (False, True))
    (x,), (turned,) = (s.batches([torch.arange(3)]) for s in (one, other))
    assert one.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert turned.equal(x.flip(1))


def photos(folder: Path, number: int = 20) -> None:
    """Images of 8 pixels, each of one colour and some grain."""
    draw = np.random.default_rng(0)
    for part, count in (("train", number), ("test", number // 2)):
        for name in NAMES:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                grain = draw.normal(0, 25, (8, 8, 3))
                pixels = (np.array(TINTS[name]) + grain).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def as_opencv_reads(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 8, 8) images, blue first, normalised with numbers in that order, and (N,) labels."""
    files = [(label, file) for label, name in enumerate(NAMES) for file in sorted((folder / name).iterdir())]
    read = np.stack([np.asarray(Image.open(file))[:, :, ::-1] for _, file in files])
    x = (read / 255 - MEAN) / STD
    return torch.from_numpy(x).permute(0, 3, 1, 2).float(), torch.tensor([label for label, _ in files])


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Photos, and the checkpoint of a network that a script with OpenCV has trained on them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("opencv")
    photos(folder / "photos")
    torch.manual_seed(0)
    network = BUILTIN["small_cnn"](3, 3)
    x, y = as_opencv_reads(folder / "photos" / "train")
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "mine.pth")
    return folder


def init(megu, project: Path, folder: Path):
    return megu(
        "init", "-c", folder / "megu.yaml", "--images", project / "photos", "--model", "small_cnn",
        "--checkpoint", project / "mine.pth", "--class", "red", "--out", folder / "run",
    )  # fmt: skip


def test_init_finds_and_writes_it_and_check_names_it(megu, project, tmp_path):
    answer = init(megu, project, tmp_path)
    assert answer.code == 0, answer.err
    assert "red and blue exchanged" in answer.out
    assert "written: " in answer.out
    assert "model.channel_order: bgr" in answer.out
    file = tmp_path / "megu.yaml"
    assert load_config(file).model.channel_order == "bgr"
    assert megu("check", "-c", file).code == 0
    wrong = megu("check", "-c", file, "--set", "model.channel_order=rgb", "--json")
    assert wrong.code == 2
    assert wrong.json["settings"]["model.channel_order"] == "bgr"
    assert "model.channel_order: bgr" in megu("check", "-c", file, "--set", "model.channel_order=rgb").err


@pytest.mark.slow
def test_an_unlearned_checkpoint_comes_back_for_the_same_script(megu, project, tmp_path):
    init(megu, project, tmp_path)
    config = yaml.safe_load((tmp_path / "megu.yaml").read_text())
    config["model"] |= {"mean": MEAN, "std": STD}
    config["labels"] = {"proxy": {"networks": 1, "passes": 2}}
    config["noise"] = {"use": "both", "steps": 3, "batch": 2}
    config["finetune"] = {"retain_fraction": 4, "batch": 20, "forget_batch": 10}
    config["eval"] = {"attack_samples": 50, "probe_samples": 100}
    file = tmp_path / "megu.yaml"
    file.write_text(yaml.safe_dump(config))
    answer = megu("run", "-c", file)
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    x, y = as_opencv_reads(project / "photos" / "train")
    network = BUILTIN["small_cnn"](3, 3).eval()
    for name, weights in (("original", project / "mine.pth"), ("unlearned", tmp_path / "run" / "model.pth")):
        network.load_state_dict(torch.load(weights, weights_only=True))
        with torch.no_grad():
            right = network(x).argmax(1) == y
        figures = result[name]
        assert figures["forget_train_acc"] == pytest.approx(right[y == 2].float().mean().item()), name
        assert figures["retain_train_acc"] == pytest.approx(right[y != 2].float().mean().item()), name


def test_pictures_for_people_and_raters_are_in_true_colours(megu, project, tmp_path, monkeypatch):
    from megu_cli.report import figures, parts
    from megu_cli.report.sections import method
    from megu_cli.run.artifacts import Artifact

    init(megu, project, tmp_path)
    context = RunContext.open(load_config(tmp_path / "megu.yaml"))
    first = context.inputs.data.train.names.index("train/red/0.png")
    shown = np.asarray(context.inputs.picture(first)).mean((0, 1))
    assert shown[0] > 150 > shown[2]

    noise = torch.zeros(1, 1, 3, 2, 2)
    noise[0, 0, 0] = 1  # blue, to this model
    artifact = Artifact({"use": "negative"}, {"negative": noise, "negative_class": torch.tensor([2])})
    meta = {"lineage": {"noise": {"settings": {}}}}
    sources = parts.Sources(Artifact({}, meta=meta), {"noise": artifact}, [], [], bgr=True)
    drawn = {}
    monkeypatch.setattr(figures, "mosaic", lambda rows, look: drawn.update(rows=rows))
    view = dataclasses.make_dataclass("V", ["sources", "classes"])(sources, NAMES)
    method.noise(view).figures[0].draw(None)
    (_, [(_, picture)]) = drawn["rows"][0]
    assert picture[:, 0, 0].tolist() == [0, 0, 1]
