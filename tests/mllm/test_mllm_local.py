from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from megu_cli.errors import DataError, MLLMError
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import FORMS, Question, single_prompt
from megu_cli.mllm.local import Local, Scorer
from megu_cli.mllm.pretrained import ImageAnswers, Pretrained

# Builder, vision tower, the token that ends a turn.
KINDS = {
    "llava": (tiny.llava, "model.vision_tower", "</s>"),
    "idefics3": (tiny.idefics3, "model.vision_model", "<end_of_utterance>"),
    "qwen2_vl": (tiny.qwen2_vl, "model.visual", "<|im_end|>"),
}
NAMES = ["Coat", "T-shirt/top", "Bag", "Ankle boot", "10"]
ANSWERS = tuple(map(str, range(11)))
PROMPTS = [single_prompt("Shirt", name, True) for name in NAMES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: kind[0](tmp_path_factory.mktemp("models") / name) for name, kind in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    net = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return AutoProcessor.from_pretrained(folder), net.eval()


def plainly(
    processor: Any, net: Any, prompt: str, image: Image.Image | None, answer: str, end: str, answers: Any = ANSWERS
) -> float:
    """log p(answer and end | prompt, image) by one forward pass over the whole conversation, without a cache."""
    shown = [{"type": "image"}] if image is not None else []
    messages = [
        {"role": "user", "content": [*shown, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]},
    ]
    before, _ = processor.apply_chat_template(messages, tokenize=False).split("ANSWER")
    words = processor.tokenizer
    bos = bool(words.bos_token) and before.startswith(words.bos_token)

    def inputs(text: str) -> Any:
        if image is None:
            return words([text], return_tensors="pt", add_special_tokens=not bos)
        return processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=not bos)

    whole = inputs(before + answer + end)
    ids = whole["input_ids"][0]
    # The answer's tokens: from where the conversations differ, up to the end. A space may be one token with some
    # answers and a token of its own before others.
    others = [inputs(before + other + end)["input_ids"][0] for other in answers if other != answer]
    start = min(next(i for i in range(len(ids)) if ids[i] != other[i]) for other in others)
    assert words.decode(ids[start:]).strip() == answer + end
    with torch.inference_mode():
        logprobs = net(**whole).logits[0].log_softmax(1)
    return float(sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids))))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(28, 28), (56, 42)], ids=["small", "large"])
def test_likelihoods_with_the_cache_equal_those_of_plain_passes(
    folders: dict[str, Path], kind: str, size: tuple[int, int]
) -> None:
    processor, net = loaded(folders[kind])
    scorer = Scorer(processor, net, kind)
    # The second image has another size: nothing of the first may remain on the model.
    for image in (picture(1, size), picture(2, (30, 70)), None):
        prompts = PROMPTS if image is not None else [single_prompt("Shirt", name, False) for name in NAMES]
        scores, _ = scorer.score(prompts, image)
        wanted = torch.tensor(
            [[plainly(processor, net, p, image, a, KINDS[kind][2]) for a in ANSWERS] for p in prompts]
        )
        assert scores.shape == (len(NAMES), 11)
        torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)
        assert wanted.std() > 0.1  # the model tells the answers apart, so equality means something


def test_ten_is_not_one(folders: dict[str, Path], kind: str) -> None:
    """All answers and their ends are different events: their probabilities add up to at most one."""
    processor, net = loaded(folders[kind])
    scores, _ = Scorer(processor, net, kind).score(PROMPTS, picture(1))
    assert bool((scores.exp().sum(1) <= 1 + 1e-5).all())


def test_ten_is_one_token_for_some_models_and_two_for_others(folders: dict[str, Path]) -> None:
    lengths = {}
    for name, folder in folders.items():
        words = loaded(folder)[0].tokenizer
        lengths[name] = [len(words(f": {a}", add_special_tokens=False)["input_ids"]) for a in ("1", "10")]
    assert any(one < ten for one, ten in lengths.values())
    assert any(one >= ten for one, ten in lengths.values())


@pytest.mark.slow
def test_batches_of_any_size_give_the_same(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, net = loaded(folders[kind])
    scorer = Scorer(processor, net, kind)
    together, _ = scorer.score(PROMPTS, picture(1))
    monkeypatch.setattr("megu_cli.mllm.local._MOST_ROWS", 1)
    torch.testing.assert_close(scorer.score(PROMPTS, picture(1))[0], together, atol=1e-5, rtol=0)


def backend(folder: Path, path: Path) -> Local:
    source = Pretrained(folder, torch.device("cpu"))
    return Local(source, ImageAnswers(picture, Answers(path), {"model": "tiny"}))


def test_one_pass_of_the_vision_tower_per_image(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "similarity.answers.jsonl"
    rater = backend(folders[kind], path)
    passes = []
    rater.scorer.net.get_submodule(KINDS[kind][1]).register_forward_hook(lambda *_: passes.append(1))
    question = Question("Shirt", [f"class {i}" for i in range(99)], [1, 2, 3])
    assert rater.cost([question]).calls == 3
    ratings = rater.rate([question])
    assert len(passes) == 3
    assert len(ratings.scores["Shirt"]) == 99
    # A new process finds the answers on disk, and does not even load the model.
    again = backend(tmp_path / "not there", path)
    assert (again.cost([question]).calls, again.cost([question]).answered) == (0, 3)
    assert again.rate([question]).scores == ratings.scores
    more = Question("Shirt", question.candidates, [1, 2, 3, 4])
    rater.rate([more])
    assert len(passes) == 4

    entry = json.loads(path.read_text().splitlines()[0])
    name = "class 7"
    likely = [math.exp(v) for v in entry["logprobs"][name]]
    share = [p / sum(likely) for p in likely]
    assert entry["mass"][name] == pytest.approx(sum(likely), rel=1e-3, abs=1e-6)
    assert entry["ratings"][name] == pytest.approx(sum(i * p for i, p in enumerate(share)), abs=1e-3)
    assert entry["entropy"][name] == pytest.approx(-sum(p * math.log(p) for p in share if p), abs=1e-3)
    assert ratings.provenance["entropy"]["Shirt"].keys() == set(question.candidates)


def test_likelihoods_of_true_and_false_equal_those_of_plain_passes(folders: dict[str, Path]) -> None:
    processor, net = loaded(folders["llava"])
    form = FORMS["true_false"]
    answers, prompts = tuple(form.answers), [form.prompt("Shirt", name, True) for name in NAMES[:2]]
    assert answers == ("True", "False")  # of different length in tokens
    scores, _ = Scorer(processor, net, "llava", answers).score(prompts, picture(1))
    wanted = [[plainly(processor, net, p, picture(1), a, "</s>", answers) for a in answers] for p in prompts]
    torch.testing.assert_close(scores, torch.tensor(wanted), atol=1e-3, rtol=0)


def test_a_rating_is_the_share_of_true_in_its_likelihoods(tmp_path: Path) -> None:
    class Sure:
        """Says of the first candidate True three times as often as False, of the second a quarter as often."""

        def score(self, prompts: list[str], image: Any) -> tuple[torch.Tensor, int]:
            assert all("True or False" in prompt for prompt in prompts)
            return torch.tensor([[0.3, 0.1], [0.05, 0.2]]).log(), 7

    path, form = tmp_path / "similarity.answers.jsonl", FORMS["true_false"]
    asker = ImageAnswers(picture, Answers(path), {"model": "tiny", **form.key})
    rater = Local(Pretrained("tiny", torch.device("cpu")), asker, form)
    rater.__dict__["scorer"] = Sure()
    question = Question("Shirt", ["Coat", "Bag"], [1, 2])
    ratings = rater.rate([question])
    assert ratings.scores["Shirt"] == pytest.approx({"Coat": 7.5, "Bag": 2.0})
    assert ratings.provenance["question"] == "true_false"
    # An answer to one question is none to the other.
    assert rater.cost([question]).calls == 0
    assert Local(rater.source, ImageAnswers(picture, Answers(path), {"model": "tiny"})).cost([question]).calls == 2


@pytest.mark.slow
def test_the_whole_stage(megu: Any, write_config: Any, folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    file = write_config(mllm={"backend": "local", "model": "./model", "images_per_class": 2})
    code, out, _ = megu("similarity", "-c", file, "--dry-run")
    assert code == 0
    assert "2 calls, 2 images" in out
    assert "a model in this process" in out
    code, out, err = megu("similarity", "-c", file, "--json", "--device", "cpu")
    assert code == 0, err
    body = json.loads(out)["similarity"]
    assert len(body["scores"]["8"]) == 9
    assert all(0 <= rating <= 10 for rating in body["scores"]["8"].values())
    assert body["rater"] == "model (likelihoods)"
    assert body["images"] == {"shown": 2, "sent_to": None, "left_the_machine": 0}
    # Another place of the same model is the same model, and so it is with what a tool left there; other weights are
    # another.
    (folder / ".cache").mkdir()
    (folder / ".cache" / "fetched").write_text("today")
    folder.rename(tmp_path / "moved")
    _, _, err = megu("similarity", "-c", file, "--set", f"mllm.model={tmp_path / 'moved'}")
    assert "similarity: fresh" in err
    tiny_weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(tiny_weights.read_bytes())
    content[-1] ^= 1
    tiny_weights.write_bytes(bytes(content))
    _, out, _ = megu("similarity", "-c", file, "--set", f"mllm.model={tmp_path / 'moved'}", "--dry-run")
    assert "the model that rates" in " ".join(out.split())


def test_weights_are_not_read_again_for_each_dry_run(
    megu: Any, write_config: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megu_cli.run import artifacts

    read: list[str] = []
    real = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", lambda path: read.append(path.name) or real(path))
    recorded, local = write_config(), {"backend": "local", "model": str(folders["llava"])}
    megu("similarity", "-c", recorded)
    memo = tmp_path / "run" / ".digests.npy"
    before = memo.read_bytes()
    for times in range(2):
        code, out, _ = megu("similarity", "-c", write_config(mllm=local), "--dry-run")
        assert code == 0
        assert "a model in this process" in out
        assert read.count("model.safetensors") == 1, times
    assert memo.read_bytes() != before
    # Where nothing ran yet, a dry run writes nothing.
    megu("similarity", "-c", write_config(mllm=local), "-o", tmp_path / "other", "--dry-run")
    assert not (tmp_path / "other").exists()


def test_a_model_without_a_chat_template_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="chat template"):
        backend(tmp_path / "model", tmp_path / "a").rate([Question("Shirt", NAMES, [1])])


def test_weights_that_are_a_pickle_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(loaded(folders["llava"])[1].state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        backend(tmp_path / "model", tmp_path / "a").rate([Question("Shirt", NAMES, [1])])


def rewritten(folder: Path, change: Any) -> None:
    """Change the tensors in a model's weights file."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    rewritten(tmp_path / "model", lambda tensors: tensors.pop(next(name for name in tensors if "q_proj" in name)))
    with pytest.raises(DataError, match=r"cannot be loaded: its files have no .*q_proj"):
        backend(tmp_path / "model", tmp_path / "a").rate([Question("Shirt", NAMES, [1])])


def test_weights_that_are_cut_short_are_an_error_of_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be loaded"):
        backend(tmp_path / "model", tmp_path / "a").rate([Question("Shirt", NAMES, [1])])


def test_a_model_whose_numbers_overflow_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    rewritten(tmp_path / "model", lambda tensors: tensors["language_model.lm_head.weight"].fill_(math.inf))
    with pytest.raises(MLLMError, match="no finite numbers"):
        backend(tmp_path / "model", tmp_path / "a").rate([Question("Shirt", NAMES, [1])])
    assert not (tmp_path / "a").exists()


def test_a_hub_id_that_cannot_be_had_is_an_error_of_the_config(
    megu: Any, write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = megu("similarity", "-c", write_config(mllm={"backend": "local", "model": "nobody/nothing"}))
    assert code == 2, err
    assert "nobody/nothing cannot be loaded" in err


def test_a_directory_that_is_not_there(megu: Any, write_config: Any) -> None:
    code, _, err = megu("similarity", "-c", write_config(mllm={"backend": "local", "model": "./nothing"}))
    assert code == 2
    assert "no directory of a model" in err
