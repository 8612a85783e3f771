"""A local vision-language model: ratings read off its likelihoods, not parsed from prose.

The rating of a pair of concepts is the expectation of 0 ... 10 under the model's own probabilities of these answers, or
with ``mllm.question: true_false`` ten times the probability of True against False.
An image, and all text before the first difference between questions, goes through the model once; its key-value cache
serves every class name and every answer.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megu_cli.errors import DataError
from megu_cli.mllm.base import FORMS, Cost, Form, Question, Ratings, averaged
from megu_cli.mllm.pretrained import ImageAnswers, Pretrained, loading, provenance

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megu_cli.mllm.backends import Setup

# Memory for the cache of one batch: with it come the rows that go through the model together.
_CACHE_BYTES = 2**30
_MOST_ROWS = 256


class Local:
    """Ratings by the likelihoods of a chat-templated vision-language model.

    Args:
        source: The model.
        image_answers: Shows the images, and keeps the answers.
        form: What is asked.
    """

    def __init__(self, source: Pretrained, image_answers: ImageAnswers, form: Form = FORMS["rating"]) -> None:
        self.source, self.image_answers, self.form = source, image_answers, form

    @classmethod
    def of(cls, setup: Setup) -> Local:
        """Return the rater of a run."""
        return cls(*loading(setup), FORMS[setup.settings.question])

    @cached_property
    def scorer(self) -> Scorer:
        """The model, loaded when it is first needed."""
        from transformers import AutoModelForImageTextToText

        processor, net = self.source.load(AutoModelForImageTextToText)
        return Scorer(processor, net, self.source.name, tuple(self.form.answers))

    def cost(self, questions: list[Question]) -> Cost:
        """See `Backend.cost`; an image counts as 576 tokens, since only the loaded model would tell."""

        def tokens(question: Question) -> int:
            names = sum(len(name) // 4 + 12 for name in question.candidates)
            return names + len(self.form.prompt(question.concept, "", True)) // 4 + (576 if question.positions else 0)

        return self.image_answers.cost(questions, tokens)

    def rate(self, questions: list[Question]) -> Ratings:
        """See `Backend.rate`."""
        found = self.image_answers.each(questions, self._ask)
        given = {concept: [entry["ratings"] for entry in entries] for concept, entries in found.items()}
        said = {
            concept: ", ".join(f"{name} {rating:.2f}" for name, rating in rows[0].items())
            for concept, rows in given.items()
        }
        scores = averaged(questions, given, said, self.form)
        entropy = {
            q.concept: {
                name: round(sum(e["entropy"][name] for e in found[q.concept]) / len(found[q.concept]), 6)
                for name in q.candidates
            }
            for q in questions
        }
        told = {**self.form.key, **provenance(found, lambda shown: self.form.prompt("…", "…", shown))}
        return Ratings(f"{self.source.name} (likelihoods)", scores, {**told, "entropy": entropy})

    def _ask(self, question: Question, image: Image.Image | None) -> dict[str, Any]:
        prompts = [self.form.prompt(question.concept, name, image is not None) for name in question.candidates]
        scores, tokens = self.scorer.score(prompts, image)
        self.source.finite(scores)
        values = scores.new_tensor([*self.form.answers.values()])
        likely = scores.softmax(1)
        names = question.candidates

        def by_name(column: torch.Tensor) -> dict[str, float]:
            return {name: round(value, 6) for name, value in zip(names, column.tolist(), strict=True)}

        return {
            "name": self.source.name,
            "ratings": by_name(likely @ values),
            "entropy": by_name(-(likely * likely.clamp_min(1e-30).log()).sum(1)),
            # How much of its probability the model gives to these answers at all.
            "mass": by_name(scores.logsumexp(1).exp()),
            "logprobs": {n: [round(v, 5) for v in row] for n, row in zip(names, scores.tolist(), strict=True)},
            "tokens": {"in": tokens, "out": 0},
        }


@dataclass(frozen=True)
class _Prefix:
    """What all questions about an image begin with, gone through the model.

    Attributes:
        cache: The key-value cache, of one row.
        length: Tokens in it.
        position: Position of the token that follows.
        rope: Whether positions have three axes, as in Qwen2-VL.
    """

    cache: Any
    length: int
    position: int
    rope: bool


class Scorer:
    """Log-likelihoods of answers to prompts about an image.

    Args:
        processor: Tokenizer, image processor and chat template.
        net: The model, in eval mode.
        name: Of the model, for messages.
        answers: The A answers.

    Raises:
        DataError: It is no chat-templated vision-language model.
    """

    def __init__(
        self, processor: Any, net: Any, name: str, answers: Sequence[str] = tuple(FORMS["rating"].answers)
    ) -> None:
        self.processor, self.net, self.name, self.answers = processor, net, name, answers
        if not hasattr(processor, "tokenizer") or not getattr(processor, "chat_template", None):
            raise DataError(
                f"mllm.model: {name} has no processor with a chat template",
                "Choose an instruction-tuned vision-language model.",
            )
        self.tokenizer = processor.tokenizer
        self._takes = inspect.signature(net.forward).parameters
        self._checked = False

    def score(self, prompts: Sequence[str], image: Image.Image | None) -> tuple[torch.Tensor, int]:
        """Log-probabilities that the model answers a prompt with each of the answers and then ends its turn.

        Args:
            prompts: Questions about the image.
            image: What is shown.

        Returns:
            (len(prompts), A) float32 on the CPU, and the number of tokens that went in.

        Raises:
            DataError: The chat template or the processor of the model cannot be used in this way.
        """
        import torch

        texts, ends = self._rendered(prompts, image is not None)
        sequences, inputs = self._tokenised(texts, image)
        flat = [ids for row in sequences for ids in row]
        length = min(_common(flat), min(_common(row) for row in sequences) - 1)
        if inputs["input_ids"].shape[1] < length or inputs["after_image"] > length:
            raise self._unusable("puts the question before the image")
        with torch.inference_mode():
            prefix = self._prefix(inputs, length)
            # Rows of the same length need no padding before the answer, and so no holes in the mask.
            groups: dict[int, list[int]] = {}
            for i, row in enumerate(sequences):
                groups.setdefault(_common(row), []).append(i)
            scores = torch.empty(len(prompts), len(self.answers))
            rows = self._rows(prefix) // len(self.answers) or 1
            tokens = length
            for common, members in groups.items():
                for start in range(0, len(members), rows):
                    chosen = members[start : start + rows]
                    scores[chosen] = self._answers(prefix, common, [sequences[i] for i in chosen], ends)
                    tokens += len(chosen) * (common - length)
        return scores, tokens

    # -- text --------------------------------------------------------------------------------------------------------

    def _rendered(self, prompts: Sequence[str], shown: bool) -> tuple[list[list[str]], list[int]]:
        """Whole conversations up to the end of each answer, and the tokens that may end a turn."""

        def render(prompt: str, answer: str) -> str:
            asked: list[dict[str, str]] = [{"type": "image"}] if shown else []
            messages = [
                {"role": "user", "content": [*asked, {"type": "text", "text": prompt}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
            return str(self.processor.apply_chat_template(messages, tokenize=False))

        texts, tail = [], ""
        for prompt in prompts:
            one, other = render(prompt, "0"), render(prompt, "7")
            start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
            tail = one[start + 1 :]
            if one[start : start + 1] != "0" or other != one[:start] + "7" + tail:
                raise self._unusable("changes an answer")
            texts.append([one[:start] + answer for answer in self.answers])
        configured = getattr(getattr(self.net, "generation_config", None), "eos_token_id", None)
        ends = set(configured if isinstance(configured, list) else [configured])
        ends.add(self.tokenizer.eos_token_id)
        first = self.tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
        ends |= set(first) & set(self.tokenizer.all_special_ids)
        return texts, sorted(int(end) for end in ends if end is not None)

    def _tokenised(
        self, texts: list[list[str]], image: Image.Image | None
    ) -> tuple[list[list[list[int]]], dict[str, Any]]:
        """Token ids of all texts, with the image's tokens in place, and the model's inputs for the first text."""
        plain = [[self._ids(text) for text in row] for row in texts]
        if image is None:
            import torch

            return plain, {"input_ids": torch.tensor([plain[0][0]]), "after_image": 0}
        inputs = dict(self._processed(texts[0][0], image))
        full, short = inputs["input_ids"][0].tolist(), plain[0][0]
        # The processor puts the image's tokens in place of one placeholder; images are costly to process, so this is
        # done once, and the same tokens are put into the other texts.
        start = _common([full, short])
        rest = min(_common([full[::-1], short[::-1]]), len(short) - start)
        block, gap = full[start : len(full) - rest], len(short) - rest - start

        def filled(ids: list[int]) -> list[int]:
            return [*ids[:start], *block, *ids[start + gap :]]

        result = [[filled(ids) for ids in row] for row in plain]
        if not self._checked:
            if self._processed(texts[-1][-1], image)["input_ids"][0].tolist() != result[-1][-1]:
                raise self._unusable("tokenises an image in a way that depends on the text")
            self._checked = True
        return result, {**inputs, "after_image": start + len(block)}

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=self._special(text))["input_ids"]]

    def _processed(self, text: str, image: Image.Image) -> Any:
        special = self._special(text)
        return self.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special)

    def _special(self, text: str) -> bool:
        """Whether the tokenizer is to add its first token: many chat templates have it already."""
        first = self.tokenizer.bos_token
        return not (first and text.startswith(str(first)))

    def _unusable(self, what: str) -> DataError:
        return DataError(f"mllm.model: the chat template of {self.name} {what}", "Choose another model.")

    # -- the model -----------------------------------------------------------------------------------------------------

    def _prefix(self, inputs: dict[str, Any], length: int) -> _Prefix:
        """Put the image and the common text through the model."""
        import torch

        whole = inputs["input_ids"].shape[1]
        given = {}
        for name, value in inputs.items():
            if name not in self._takes or name in ("attention_mask", "position_ids"):
                continue
            # What there is one of for each token is cut at the prefix; pictures are whole.
            per_token = name == "input_ids" or name.endswith("token_type_ids")
            value = value[:, :length] if per_token else value
            given[name] = value.to(self.net.device, self.net.dtype if value.is_floating_point() else None)
        rope = getattr(getattr(self.net, "model", None), "get_rope_index", None)
        positions = torch.arange(whole)[None]
        if rope is not None and "pixel_values" in inputs:
            # Qwen2-VL gives an image's tokens positions in a grid, and keeps the offset of what follows on the model:
            # positions are passed explicitly, so that nothing of an earlier image remains.
            known = inspect.signature(rope).parameters
            positions = rope(**{name: value for name, value in inputs.items() if name in known})[0]
        positions = positions[..., :length].to(self.net.device)
        output = self._forward(positions=positions, past=0, keep=1, use_cache=True, **given)
        return _Prefix(output.past_key_values, length, int(positions[..., -1].max()) + 1, positions.ndim == 3)

    def _answers(self, prefix: _Prefix, common: int, sequences: list[list[list[int]]], ends: list[int]) -> torch.Tensor:
        """(len(sequences), A) scores; ``common`` tokens of each row's answers are shared."""
        import torch

        device = self.net.device
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(sequences))
        questions = torch.tensor([row[0][prefix.length : common] for row in sequences], device=device)
        output = self._continued(prefix, cache, questions, 0, 1)
        first = output.logits[:, -1].float().log_softmax(1)

        answers = [ids[common:] for row in sequences for ids in row]
        longest = max(map(len, answers))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in answers], device=device)
        cache.batch_repeat_interleave(len(self.answers))
        output = self._continued(prefix, cache, padded, questions.shape[1], 0)
        following = output.logits.float().log_softmax(2)

        lengths = torch.tensor([len(ids) for ids in answers], device=device)
        scores = first.repeat_interleave(len(self.answers), 0).gather(1, padded[:, :1])[:, 0]
        if longest > 1:
            steps = following[:, :-1].gather(2, padded[:, 1:, None])[..., 0]
            scores = scores + (steps * (torch.arange(1, longest, device=device) < lengths[:, None])).sum(1)
        last = following[torch.arange(len(answers), device=device), lengths - 1]
        total: torch.Tensor = scores + last[:, ends].logsumexp(1)
        return total.view(len(sequences), len(self.answers)).cpu()

    def _continued(self, prefix: _Prefix, cache: Any, ids: torch.Tensor, offset: int, keep: int) -> Any:
        """Put tokens through the model that follow the prefix after ``offset`` others."""
        import torch

        rows, width = ids.shape
        positions = torch.arange(width, device=ids.device) + prefix.position + offset
        positions = positions.expand(3, rows, width) if prefix.rope else positions.expand(rows, width)
        past = prefix.length + offset
        return self._forward(positions=positions, past=past, keep=keep, input_ids=ids, past_key_values=cache)

    def _forward(self, *, positions: torch.Tensor, past: int, keep: int, **given: Any) -> Any:
        import torch

        rows, width = given["input_ids"].shape
        mask = torch.ones(rows, past + width, dtype=torch.int64, device=positions.device)
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = keep
        return self.net(attention_mask=mask, position_ids=positions, **given)

    def _rows(self, prefix: _Prefix) -> int:
        """Rows that go through the model together."""
        layers = [layer for layer in prefix.cache.layers if getattr(layer, "keys", None) is not None]
        size: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return max(1, min(_MOST_ROWS, math.floor(_CACHE_BYTES / max(size, 1))))


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning."""
    shortest = min(map(len, sequences))
    first = sequences[0][:shortest]
    for i, token in enumerate(first):
        if any(ids[i] != token for ids in sequences):
            return i
    return shortest
