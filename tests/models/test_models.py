"""Models and strict checkpoints."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import data_set
from torch import nn

from megu_cli import training
from megu_cli.config import TrainConfig, load_config
from megu_cli.errors import CheckpointError, ConfigError
from megu_cli.execution import runtime
from megu_cli.execution.runtime import seeded
from megu_cli.models import checkpoints, features, sources, weights


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("small_cnn", 1, 8), ("small_resnet", 1, 28), ("resnet18", 3, 32), ("torchvision:mobilenet_v3_small", 3, 64)],
)
def test_every_model_classifies_and_shows_its_features(name, channels, size):
    with seeded(0, "test"):
        model = sources.build(name, 7, channels).eval()
    x = torch.rand(2, channels, size, size)
    with features.penultimate(model, 7) as found:
        assert model(x).shape == (2, 7)
    assert found[0].ndim == 2
    assert torch.allclose(features.classifier(model, 7)(found[0]), model(x), atol=1e-5)


def test_the_cifar_resnet18_is_the_fields_own():
    model = sources.build("resnet18", 10, 3)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert model.blocks(model.stem(torch.rand(1, 3, 32, 32))).shape == (1, 512, 4, 4)


def test_a_re_initialisation_differs_in_every_random_layer():
    states = []
    for path in ("train", "oracle"):
        with seeded(0, path, "init"):
            states.append(sources.build("small_resnet", 10, 1).state_dict())
    for key in states[0]:
        if states[0][key].ndim > 1 or key == "head.bias":
            assert not torch.equal(states[0][key], states[1][key]), key


def test_seeding_a_block_leaves_the_outside_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with seeded(0, "a"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(0, "a"):
        assert torch.equal(torch.rand(3), inside)


def test_an_unlearned_state_takes_the_dtypes_of_the_input():
    state = {"w": torch.rand(2, 2), "n": torch.tensor(3)}
    original = {"n": torch.tensor(1), "w": torch.rand(2, 2).half()}
    result = weights.like(state, original)
    assert list(result) == ["n", "w"]
    assert result["w"].dtype == torch.half
    assert result["n"].dtype == torch.int64


def test_a_half_precision_checkpoint_is_loaded_and_written_as_such(tmp_path):
    model = sources.build("small_cnn", 10, 1)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    read = checkpoints.read(tmp_path / "half.pth", model).state
    loaded = weights.load_state(sources.build("small_cnn", 10, 1), read, "half.pth")
    assert next(loaded.parameters()).dtype == torch.float32
    assert {v.dtype for v in weights.like(loaded.state_dict(), read).values()} == {torch.float16, torch.int64}


def test_frozen_restores_what_it_found():
    model = sources.build("small_cnn", 10, 1).train()
    first = next(model.parameters()).requires_grad_(False)
    with features.frozen(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not first.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1


def test_a_model_without_a_head_of_that_size():
    with pytest.raises(CheckpointError, match="no final layer with 9 outputs"):
        features.classifier(sources.build("small_cnn", 10, 1), 9)


FACTORIES = """
import torch
from types import SimpleNamespace
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10, kind="tensor"):
        super().__init__()
        self.conv, self.fc, self.kind = nn.Conv2d(1, 4, 3), nn.Linear(4, classes), kind

    def forward(self, x):
        y = self.fc(self.conv(x).mean((2, 3)))
        return {"tensor": y, "object": SimpleNamespace(logits=y), "tuple": (y, y + 1), "list": [y],
                "dict": {"loss": 0, "logits": y}, "mapping": {"out": y}, "nothing": "text"}[self.kind]

def kinds(kind): return lambda: Net(kind=kind)
object_, tuple_, list_, dict_, mapping, nothing = map(kinds, ("object", "tuple", "list", "dict", "mapping", "nothing"))
def sized(classes, channels): return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))
def keywords(**given): return Net(given["classes"])
def broken(): raise ValueError("no weights here")
def text(): return "text"
shared = Net()
def same(): return shared
number = 3
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    return lambda name: f"python:{tmp_path / 'my_nets'}:{name}"


@pytest.mark.parametrize("kind", ["Net", "object_", "tuple_", "list_", "dict_", "mapping"])
def test_whatever_a_model_returns_its_logits_are_taken(factories, kind):
    with seeded(0, "test"):
        model = sources.build(factories(kind), 10, 1).eval()
    x = torch.rand(2, 1, 8, 8)
    expected = model.fc(model.conv(x).mean((2, 3)))
    for net in (model, copy.deepcopy(model).train()):
        assert torch.equal(net(x), expected)
        assert set(net.state_dict()) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
        with features.penultimate(net, 10) as found:
            net(x)
        assert torch.allclose(model.fc(found[0]), expected)


def test_factories_are_told_what_they_ask_for(factories):
    assert sources.build(factories("sized"), 7, 3)(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    assert sources.build(factories("keywords"), 7, 1).fc.out_features == 7
    first, second = (sources.build(factories("same"), 10, 1) for _ in range(2))
    assert first.fc.weight is not second.fc.weight
    assert sources.channels_of(factories("sized")) is None
    assert sources.channels_of(factories("Net")) == 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("broken", r"my_nets:broken\(\) failed: ValueError: no weights here"),
        ("text", "gave a str, no torch.nn.Module"),
        ("number", "has no function 'number'"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_factories_that_fail(factories, name, part):
    with pytest.raises(ConfigError, match=part):
        sources.build(factories(name), 10, 1)


def test_modules_of_one_name_in_two_folders(tmp_path):
    for folder, classes in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(f"from torch import nn\ndef make(): return nn.Linear(2, {classes})")
    for folder, classes in (("a", 3), ("b", 4), ("a", 3)):
        assert sources.build(f"python:{tmp_path / folder / 'net'}:make", 1, 1).out_features == classes
    with pytest.raises(ConfigError, match="the module nowhere cannot be imported: ModuleNotFoundError"):
        sources.build(f"python:{tmp_path / 'nowhere'}:make", 1, 1)
    with pytest.raises(ConfigError, match="is not of the form python:MODULE:FACTORY"):
        sources.check_name(f"python:{tmp_path / 'net'}")


def test_a_folder_in_a_models_name_is_relative_to_the_yaml(tmp_path, monkeypatch):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "vit").mkdir()
    file = tmp_path / "my" / "megu.yaml"
    for name, expected in [
        ("python:nets:make", f"python:{tmp_path}/my/nets:make"),
        ("python:../code/nets:make", f"python:{tmp_path}/my/../code/nets:make"),
        ("hf:vit", f"hf:{tmp_path}/my/vit"),
        ("hf:./elsewhere", f"hf:{tmp_path}/my/elsewhere"),
        ("hf:org/vit", "hf:org/vit"),
    ]:
        file.write_text(f"data: {{name: digits}}\nforget: {{classes: [1]}}\nmodel: {{name: '{name}'}}")
        assert load_config(file).model.name == expected


def test_outputs_that_are_no_logits_are_told(factories):
    with pytest.raises(CheckpointError, match="returns a str, in which no logits are found"):
        sources.try_out(sources.build(factories("nothing"), 10, 1), (1, 8, 8), 10)
    model = sources.build(factories("Net"), 7, 1)
    sources.try_out(model, (1, 8, 8), 7)
    with pytest.raises(ConfigError, match="the model has 7 outputs, and the data have 10 classes"):
        sources.try_out(model, (1, 8, 8), 10)
    with pytest.raises(ConfigError, match=r"cannot take images of 3 x 8 x 8: .*3 channels"):
        sources.try_out(model, (3, 8, 8), 7)
    both = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Linear(7, 5))
    with pytest.raises(ConfigError, match="the model has 5 outputs, and the data have 7 classes"):
        sources.try_out(both, (1, 8, 8), 7)


class Cosine(nn.Module):
    """A head that is no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(7, 16))

    def forward(self, x):
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


def test_running_statistics_follow_a_finetuning_and_no_longer():
    layers = [nn.BatchNorm1d(2, momentum=m) for m in (0.01, 0.3, None)]
    with features.following(nn.Sequential(*layers)):
        assert [layer.momentum for layer in layers] == [0.1, 0.3, None]
    assert [layer.momentum for layer in layers] == [0.01, 0.3, None]


def test_the_classifier_is_the_layer_that_runs_last():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 7, bias=False)
            self.body = nn.Linear(64, 16)
            self.early = nn.Linear(16, 7)

        def forward(self, x):
            y = self.body(x.flatten(1))
            return self.head(y + 0 * self.early(y).sum())

    model = Turned()
    with features.penultimate(model, 7) as found:
        logits = model(torch.rand(2, 1, 8, 8))
    assert torch.equal(model.head(found[0]), logits)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Cosine())
    with features.penultimate(model, 7) as found:
        logits = model(torch.rand(2, 1, 8, 8))
    assert torch.equal(model[2](found[0]), logits)


def test_weights_that_the_logits_do_not_depend_on():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop, self.head = nn.Linear(64, 8), nn.Dropout(0.9), nn.Linear(8, 5)
            self.aux = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))

        def forward(self, x):
            y = self.drop(self.body(x.flatten(1)))
            return SimpleNamespace(logits=self.head(y), aux=self.aux(y) if self.training else None)

    model = Aux().train()
    model.register_forward_hook(sources._as_logits)
    model.body.bias.requires_grad_(False)
    assert weights.unreached(model, torch.rand(1, 1, 8, 8)) == [
        "aux.0.weight",
        "aux.0.bias",
        "aux.1.weight",
        "aux.1.bias",
    ]
    assert model.training
    assert not model.body.bias.requires_grad
    assert model.head.weight.requires_grad
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)


def test_an_auxiliary_head_is_initialised_anew(megu, finished):
    """It gets no gradient from the logits, and would keep what it learned."""
    folder = finished.parent
    (folder / "aux_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc, self.aux = nn.Conv2d(1, 8, 3), nn.Linear(288, classes), nn.Linear(288, classes)\n"
        "    def forward(self, x):\n"
        "        y = self.conv(x).relu().flatten(1)\n"
        "        return (self.fc(y), self.aux(y)) if self.training else self.fc(y)\n"
    )
    model = sources.build(f"python:{folder / 'aux_net'}:Net", 10, 1)
    torch.save(model.state_dict(), folder / "mine.pth")
    file = folder / "own.yaml"
    file.write_text(finished.read_text().replace("name: small_cnn", "name: 'python:aux_net:Net'"))
    answer = megu("run", "-c", file, "-o", folder / "out", "--set", "model.preflight=false",
                  "--set", f"model.checkpoint={folder / 'mine.pth'}")  # fmt: skip
    assert answer.code == 0, answer.err
    assert "initialised anew, since the logits do not depend on them: aux.weight, aux.bias" in answer.err
    new = torch.load(folder / "out" / "model.pth", weights_only=True)
    assert not torch.equal(new["aux.weight"], model.state_dict()["aux.weight"])
    assert new.keys() == model.state_dict().keys()


def test_a_last_batch_of_one_sample_does_not_stop_batch_norm():
    digits = data_set("digits", limit=65)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    history = training.train_classifier(
        model, digits.train, torch.arange(65), TrainConfig(epochs=1, batch=32, weight_decay=0), label="train"
    )  # fmt: skip
    assert history.steps == 3


def test_precision_of_training_steps():
    digits = data_set("digits", limit=64)
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            y = self.fc(x.flatten(1))
            seen.append((self.training, y.dtype))
            return y

    def types(precision):
        seen.clear()
        runtime.use_precision(precision)
        model = Net()
        training.train_classifier(
            model, digits.train, torch.arange(64), TrainConfig(epochs=1, batch=64, weight_decay=0), label="train",
            validate=lambda net: training.accuracy(net, digits.train, torch.arange(8)),
        )  # fmt: skip
        assert model.fc.weight.dtype == torch.float32
        return list(seen)

    try:
        assert types("bfloat16") == [(True, torch.bfloat16), (False, torch.float32)]
        assert types("auto") == types("float32") == [(True, torch.float32), (False, torch.float32)]
    finally:
        runtime.use_precision("auto")


def test_a_model_of_timm():
    assert sources.channels_of("timm:test_resnet") is None
    model = sources.build("timm:test_resnet", 7, 1).eval()
    sources.try_out(model, (1, 32, 32), 7)
    assert sources.build("timm:test_vit", 7, 3).eval()(torch.rand(2, 3, 160, 160)).shape == (2, 7)
    found = sources.preprocessing_of("timm:test_vit", folder_like=True)
    assert (found.image_size, found.interpolation, found.crop) == (160, "bicubic", 0.95)
    assert sources.preprocessing_of("timm:test_vit", folder_like=False) == sources.Preprocessing()
    with pytest.raises(ConfigError, match="timm has no model 'test_wit'"):
        sources.check_name("timm:test_wit")


def test_a_model_of_torchvision_says_what_its_weights_take():
    found = sources.preprocessing_of("torchvision:resnet18", folder_like=True)
    assert (found.image_size, found.interpolation, found.crop) == (224, "bilinear", 0.875)
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))
    assert sources.preprocessing_of("torchvision:inception_v3", folder_like=True).image_size == 299
    assert sources.preprocessing_of("torchvision:resnet18", folder_like=False) == sources.Preprocessing()


def test_the_auxiliary_heads_of_googlenet():
    with seeded(0, "test"):
        model = sources.build("torchvision:googlenet", 7, 3).train()
    x = torch.rand(2, 3, 64, 64)
    assert model(x).shape == (2, 7)
    assert {name.split(".")[0] for name in weights.unreached(model, x)} == {"aux1", "aux2"}
    assert features.classifier(model, 7) is model.fc
