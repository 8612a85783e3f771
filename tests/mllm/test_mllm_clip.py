from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from megu_cli.errors import DataError, MLLMError
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import Question
from megu_cli.mllm.clip import Clip
from megu_cli.mllm.pretrained import ImageAnswers, Pretrained

NAMES = ["polar_bear", "Bag", "Ankle boot", "sea"]
QUESTION = Question("wolf", NAMES, [1, 2])


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(tiny, request.param)(tmp_path_factory.mktemp("models") / request.param)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def backend(folder: Path, path: Path) -> Clip:
    source = Pretrained(folder, torch.device("cpu"))
    return Clip(source, ImageAnswers(picture, Answers(path), {"model": "tiny"}))


def test_ratings_are_linear_in_the_models_own_logits(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    rater = backend(folder, tmp_path / "a.jsonl")
    net, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    ratings = rater.rate([QUESTION]).scores["wolf"]
    texts = ["a photo of a wolf", "a photo of a polar bear", *(f"a photo of a {n}" for n in NAMES[1:])]
    padding = "max_length" if "siglip" in folder.name else True
    inputs = processor(text=texts, images=[picture(1), picture(2)], padding=padding, return_tensors="pt")
    with torch.no_grad():
        logits = net(**inputs).logits_per_image.mean(0)
    low, top = logits[1:].min(), logits.max()
    wanted = 10 * (logits[1:] - low) / (top - low)
    assert [ratings[name] for name in NAMES] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert min(ratings.values()) == 0
    entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(entries) == 2
    assert backend(tmp_path / "not there", tmp_path / "a.jsonl").rate([QUESTION]).scores["wolf"] == ratings


def test_an_image_is_encoded_once(folder: Path, tmp_path: Path) -> None:
    rater = backend(folder, tmp_path / "a.jsonl")
    passes: list[int] = []
    net = rater._loaded[1]
    net.vision_model.register_forward_hook(lambda *_: passes.append(1))
    rater.rate([QUESTION])
    assert len(passes) == 2


def test_by_name_alone(folder: Path, tmp_path: Path) -> None:
    rater = backend(folder, tmp_path / "a.jsonl")
    ratings = rater.rate([Question("wolf", NAMES, [])])
    assert len(ratings.scores["wolf"]) == 4
    assert ratings.provenance["images"]["shown"] == 0


def test_a_model_that_does_not_tell_names_apart_is_refused(folder: Path, tmp_path: Path) -> None:
    rater = backend(folder, tmp_path / "a.jsonl")
    with torch.no_grad():
        rater._loaded[1].logit_scale.fill_(-5.0)
    with pytest.raises(MLLMError, match="wolf: all logits lie between"):
        rater.rate([QUESTION])


def test_ratings_that_are_alike_beside_the_own_name_are_refused(tmp_path: Path) -> None:
    """Logits may be apart, and the ratings made of them not."""
    found = Clip(
        Pretrained("tiny", torch.device("cpu")), ImageAnswers(picture, Answers(tmp_path / "a"), {"model": "tiny"})
    )
    logits = {"wolf": 100.0, "polar_bear": 1.0, "Bag": 2.0, "Ankle boot": 1.5, "sea": 5.0}
    found._ask = lambda question, image: {"logits": logits}  # type: ignore[method-assign]
    with pytest.raises(MLLMError, match=r"wolf: all ratings lie between 0\.00 and 0\.40"):
        found.rate([QUESTION])


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CLIP or SigLIP model"):
        backend(tiny.llava(tmp_path / "llava"), tmp_path / "a.jsonl").rate([QUESTION])


def test_the_whole_stage(megu: Any, write_config: Any, tmp_path: Path) -> None:
    folder = tiny.clip(tmp_path / "clip")
    file = write_config(mllm={"backend": "clip", "model": str(folder), "images_per_class": 2})
    code, out, err = megu("similarity", "-c", file, "--json", "--device", "cpu")
    assert code == 0, err
    body = json.loads(out)["similarity"]
    assert body["rater"] == "clip (image-text similarity)"
    assert body["backend"] == "clip"
    assert len(body["scores"]["8"]) == 9
    assert body["images"] == {"shown": 2, "sent_to": None, "left_the_machine": 0}
