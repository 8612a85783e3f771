"""Models of transformers that run in this process: found, loaded, and asked image by image."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.errors import DataError, MLLMError
from megu_cli.execution.runtime import Track, silent
from megu_cli.mllm import pictures
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import FORMS, PROMPT_VERSION, Cost, Question, Show

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megu_cli.mllm.backends import Setup


@dataclass(frozen=True)
class Pretrained:
    """A model of transformers that is yet to be loaded.

    Attributes:
        model: A hub id, or a directory.
        device: Where it computes.
        revision: Commit, tag or branch of a hub id.
        dtype: ``auto`` or the name of a torch dtype.
        trust_remote_code: Whether code that comes with the model may run.
    """

    model: Path | str
    device: torch.device
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        """What the model is called: a directory by its own name."""
        return self.model.name if isinstance(self.model, Path) else self.model

    def load(self, auto: Any) -> tuple[Any, Any]:
        """A processor and the model, in eval mode on the device.

        The network is used only where a hub id is not in the local cache, and weights are read from safetensors only.

        Args:
            auto: The Auto class of the model.

        Raises:
            DataError: It is neither there nor to be downloaded, it is no such model, or not all of it is there.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights; the stage has its own
        dtype = self.dtype
        if dtype == "auto":
            dtype = {"cuda": "bfloat16", "mps": "float16"}.get(self.device.type, "float32")
        common: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if isinstance(self.model, str):
            common["revision"] = self.revision or "main"
        # A directory is all there is; a hub id is looked for in the cache before it is downloaded.
        for only_local in (True,) if isinstance(self.model, Path) else (True, False):
            try:
                processor = AutoProcessor.from_pretrained(self.model, local_files_only=only_local, **common)
                net, loading = auto.from_pretrained(
                    self.model,
                    local_files_only=only_local,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    **common,
                )
            except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
                trouble = next(iter(str(error).strip().splitlines()), type(error).__name__)
                continue
            if loading["missing_keys"]:
                # transformers would go on with random numbers in their place.
                trouble = f"its files have no {min(loading['missing_keys'])}"
                break
            return processor, net.to(self.device).eval()
        raise DataError(
            f"mllm.model: {self.model} cannot be loaded: {trouble}",
            "Give a hub id that can be downloaded, or a directory (absolute, or beginning with ./) with the model's "
            "config, processor and safetensors files.",
        )

    def finite(self, values: torch.Tensor) -> torch.Tensor:
        """The values that the model gave, all of which are numbers.

        Raises:
            MLLMError: Some are not: the model's numbers do not fit its dtype.
        """
        if not bool(values.isfinite().all()):
            raise MLLMError(
                f"{self.name} computes values that are no finite numbers",
                "Set mllm.dtype to float32, or choose another model.",
            )
        return values


class ImageAnswers:
    """Asks about each image once, and keeps the answers.

    Args:
        show: Gives the pictures.
        answers: Where raw answers are kept.
        asker: What else, beside question and image, determines an answer.
        track: Reports progress.
    """

    def __init__(self, show: Show, answers: Answers, asker: dict[str, Any], track: Track = silent) -> None:
        self.show, self.answers, self.asker, self.track = show, answers, asker, track

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


def loading(setup: Setup) -> tuple[Pretrained, ImageAnswers]:
    """The model of a run, and what asks it about images."""
    settings = setup.settings
    assert settings.model is not None  # the config has seen to it
    source = Pretrained(
        settings.model,
        setup.device,
        revision=settings.revision,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    asker = {"backend": settings.backend, "model": setup.identity(), "dtype": settings.dtype}
    asker |= FORMS[settings.question].key
    return source, ImageAnswers(setup.show, Answers(setup.answers), asker, setup.track)


def provenance(found: dict[str, list[dict[str, Any]]], prompt: Callable[[bool], str]) -> dict[str, Any]:
    """What the artifact tells of answers that were all given in this process.

    Args:
        found: concept -> its answers, as `ImageAnswers.each` gives them.
        prompt: The wording of a question, with an image shown or without.
    """
    shown = len({entry["image"] for entries in found.values() for entry in entries} - {None})
    return {
        "prompt": {"version": PROMPT_VERSION, "text": prompt(shown > 0)},
        "images": {"shown": shown, "sent_to": None, "left_the_machine": 0},
        "missing": {},
    }
