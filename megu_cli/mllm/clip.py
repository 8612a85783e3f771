"""Zero-shot similarity by a CLIP or SigLIP model, for those who have no multimodal LLM.

Source: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP). Such a model gives a logit l(k) of image and name: the
cosine of their features times the model's own scale. A rating is linear in the mean logit over images: 0 for the
least similar candidate, 10 for the concept's own name (or a candidate that comes before it):

    rating(k) = 10 (l(k) - min_j l(j)) / (max(l(own), max_j l(j)) - min_j l(j))

The order is the model's; the distances say less than an MLLM's. Where the candidates' logits differ by less than
`FLAT` the model does not tell them apart, and the row is refused before any scaling.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from megu_cli.errors import DataError, MLLMError
from megu_cli.mllm.base import FLAT, SCALE, Cost, Question, Ratings
from megu_cli.mllm.pretrained import ImageAnswers, Pretrained, loading, provenance

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megu_cli.mllm.backends import Setup

_TEMPLATE = "a photo of a {}"


class Clip:
    """Ratings by cosine of image and text features; see `Local` for the arguments."""

    def __init__(self, source: Pretrained, image_answers: ImageAnswers) -> None:
        self.source, self.image_answers = source, image_answers
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, setup: Setup) -> Clip:
        """Return the rater of a run."""
        return cls(*loading(setup))

    def cost(self, questions: list[Question]) -> Cost:
        """See `Backend.cost`."""
        return self.image_answers.cost(questions, lambda question: 8 * (len(question.candidates) + 1))

    def rate(self, questions: list[Question]) -> Ratings:
        """See `Backend.rate`."""
        found = self.image_answers.each(questions, self._ask)
        scores, faults = {}, []
        for question in questions:
            entries = found[question.concept]
            mean = {name: sum(e["logits"][name] for e in entries) / len(entries) for name in entries[0]["logits"]}
            own = mean.pop(question.concept)
            low, high = min(mean.values()), max(mean.values())
            if high - low < FLAT:
                faults.append(f"  {question.concept}: all logits lie between {low:.3f} and {high:.3f}")
                continue
            share = SCALE[1] / (max(own, high) - low)
            if share * (high - low) < FLAT:
                # The own name stands so far out that the candidates are all alike beside it.
                faults.append(f"  {question.concept}: all ratings lie between 0.00 and {share * (high - low):.2f}")
            scores[question.concept] = {name: round(share * (value - low), 6) for name, value in mean.items()}
        if faults:
            raise MLLMError(
                f"{len(faults)} of {len(questions)} rows of ratings carry no information\n" + "\n".join(faults),
                "Set mllm.model to a more capable model, or choose another mllm.backend.",
            )
        told = provenance(found, lambda shown: _TEMPLATE.format("…"))
        return Ratings(f"{self.source.name} (image-text similarity)", scores, told)

    def _ask(self, question: Question, image: Image.Image | None) -> dict[str, Any]:
        import torch

        names = [question.concept, *question.candidates]
        processor, net = self._loaded
        with torch.inference_mode():
            texts = self._text_features(names)
            if image is None:
                shown = texts[:1]
            else:
                pixels = processor(images=[image], return_tensors="pt").to(net.device, net.dtype)
                shown = _normalised(net.get_image_features(**pixels))
            logits = self.source.finite((shown @ texts.T)[0] * net.logit_scale.float().exp())
        return {
            "name": self.source.name,
            "logits": {name: round(value, 5) for name, value in zip(names, logits.tolist(), strict=True)},
            "tokens": None,
        }

    def _text_features(self, names: list[str]) -> torch.Tensor:
        """(len(names), D) unit vectors; each name is encoded once."""
        import torch

        processor, net = self._loaded
        new = [name for name in names if name not in self._texts]
        if new:
            # SigLIP was trained on texts padded to their full length, and reads them so.
            padding: bool | str = "max_length" if net.config.model_type.startswith("siglip") else True
            texts = [_TEMPLATE.format(name.replace("_", " ")) for name in new]
            inputs = processor(text=texts, padding=padding, truncation=True, return_tensors="pt").to(net.device)
            self._texts |= dict(zip(new, _normalised(net.get_text_features(**inputs)), strict=True))
        return torch.stack([self._texts[name] for name in names])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel

        processor, net = self.source.load(AutoModel)
        if not (
            hasattr(net, "get_image_features") and hasattr(net, "get_text_features") and hasattr(net, "logit_scale")
        ):
            raise DataError(
                f"mllm.model: {self.source.name} is no CLIP or SigLIP model",
                "For a model that chats, set mllm.backend to local.",
            )
        return processor, net


def _normalised(features: Any) -> torch.Tensor:
    """Unit vectors; newer versions of transformers wrap the features."""
    pooled: torch.Tensor = getattr(features, "pooler_output", features).float()
    unit: torch.Tensor = pooled / pooled.norm(dim=1, keepdim=True)
    return unit
