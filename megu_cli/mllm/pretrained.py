"""Models of transformers that run in this process: found, loaded, and asked image by image."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.errors import DataError
from megu_cli.mllm import pictures
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import PROMPT_VERSION, Cost, Question, Show
from megu_cli.runtime import Track

if TYPE_CHECKING:
    import torch
    from PIL import Image


def load(
    auto: Any, model: Path | str, *, revision: str | None, dtype: str, trust_remote_code: bool, device: torch.device
) -> tuple[Any, Any]:
    """A processor and a model in eval mode on the device.

    The network is used only where a hub id is not in the local cache, and weights are read from safetensors only.

    Args:
        auto: The Auto class of the model.
        model: A hub id, or a directory.
        revision: Commit, tag or branch of a hub id.
        dtype: ``auto`` or the name of a torch dtype.
        trust_remote_code: Whether code that comes with the model may run.
        device: Where it computes.

    Raises:
        DataError: It is neither there nor to be downloaded, or it is no such model.
    """
    import torch
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights; the stage has its own
    if dtype == "auto":
        dtype = {"cuda": "bfloat16", "mps": "float16"}.get(device.type, "float32")
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if isinstance(model, str):
        common["revision"] = revision or "main"
    # A directory is all there is; a hub id is looked for in the cache before it is downloaded.
    for only_local in (True,) if isinstance(model, Path) else (True, False):
        try:
            processor = AutoProcessor.from_pretrained(model, local_files_only=only_local, **common)
            net = auto.from_pretrained(
                model,
                local_files_only=only_local,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                **common,
            )
            return processor, net.to(device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            trouble = str(error).strip().splitlines()[0]
    raise DataError(
        f"mllm.model: {model} cannot be loaded: {trouble}",
        "Give a hub id that can be downloaded, or a directory (absolute, or beginning with ./) with the model's "
        "config, processor and safetensors files.",
    )


def name_of(model: Path | str) -> str:
    """What a model is called: a directory by its own name."""
    return model.name if isinstance(model, Path) else model


class Looking:
    """Asks about each image once, and keeps the answers.

    Args:
        show: Gives the pictures.
        answers: Where raw answers are kept.
        track: Reports progress.
        asker: What else, beside question and image, determines an answer.
    """

    def __init__(self, show: Show, answers: Answers, track: Track, asker: dict[str, Any]) -> None:
        self.show, self.answers, self.track, self.asker = show, answers, track, asker

    def cost(self, questions: list[Question], text_tokens: Callable[[Question], int]) -> Cost:
        """What is not answered yet."""
        left = [(q, p) for q in questions for p in q.positions or (None,) if self.answers.find(self._key(q, p)) is None]
        total = sum(len(q.positions) or 1 for q in questions)
        images = len({position for _, position in left if position is not None})
        return Cost(len(left), total - len(left), images, sum(text_tokens(q) for q, _ in left))

    def each(
        self, questions: list[Question], ask: Callable[[Question, Image.Image | None], dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The answers to each question, image by image; only what is not on disk is asked."""
        found: dict[str, list[dict[str, Any]]] = {}
        jobs = [(question, position) for question in questions for position in question.positions or (None,)]
        with self.track("similarity", len(jobs)) as advance:
            for question, position in jobs:
                key = self._key(question, position)
                entry = self.answers.find(key)
                if entry is None:
                    started = time.perf_counter()
                    answer = ask(question, None if position is None else self.show(position))
                    seconds = round(time.perf_counter() - started, 3)
                    entry = self.answers.append(key, {"seconds": seconds, **answer})
                found.setdefault(question.concept, []).append(entry)
                advance()
        return found

    def _key(self, question: Question, position: int | None) -> dict[str, Any]:
        return {
            **self.asker,
            "prompt": PROMPT_VERSION,
            "concept": question.concept,
            "image": None if position is None else pictures.digest(self.show(position)),
            "candidates": question.candidates,
        }
