"""Tiny vision-language models with random weights, saved to disk as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Every token of it is made on the spot: bytes, and merges learned from this text.
_CORPUS = [
    "The image shows an example of the class. On a scale from 0 (nothing in common) to 10 (hardly distinguishable)",
    "how similar is the concept shown to the class? answer with one whole number User: Assistant: user assistant",
] * 3


def tokenizer(special: list[str], digits: bool = False, **named: Any) -> Any:
    """A byte-level BPE tokenizer with its own special tokens, which may split numbers into digits."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def _text(vocabulary: int, end: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": end,
        "pad_token_id": end,
        "bos_token_id": None,
    }


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def llava(folder: Path) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer(["<s>", "</s>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="</s>")
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}"
        "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_text(len(words), words.eos_token_id)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor)


def idefics3(folder: Path) -> Path:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )

    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    special = ["<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *rows]
    words = tokenizer(special, True, eos_token="<end_of_utterance>", pad_token="<end_of_utterance>")
    template = (
        "{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    # Images larger than a tile are cut into several, beside a small view of the whole.
    pictures = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(pictures, words, image_seq_len=4, chat_template=template)
    config = Idefics3Config(
        vision_config=_VISION,
        text_config=LlamaConfig(**_text(len(words), words.eos_token_id)),
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    return _save(folder, Idefics3ForConditionalGeneration, config, processor, seed=6)


def qwen2_vl(folder: Path) -> Path:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(special, True, eos_token="<|im_end|>", pad_token="<|im_end|>")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sizes = {"patch_size": 7, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"shortest_edge": 14 * 14 * 4, "longest_edge": 14 * 14 * 64}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes, size=limits),
        words,
        Qwen2VLVideoProcessor(**sizes, size=limits),
        chat_template=template,
    )
    token = words.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config={
            **_text(len(words), words.eos_token_id),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return _save(folder, Qwen2VLForConditionalGeneration, config, processor)


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>", pad_token="</s>")
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    config = CLIPConfig(text_config=_text(len(words), words.eos_token_id), vision_config=_VISION, projection_dim=16)
    return _save(folder, CLIPModel, config, CLIPProcessor(pictures, words))


def siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    words = tokenizer(["</s>"], eos_token="</s>", pad_token="</s>", model_max_length=32)
    pictures = SiglipImageProcessor(size={"height": 28, "width": 28})
    config = SiglipConfig(
        text_config={**_text(len(words), words.eos_token_id), "max_position_embeddings": 32}, vision_config=_VISION
    )
    return _save(folder, SiglipModel, config, SiglipProcessor(pictures, words))


def _save(folder: Path, kind: Any, config: Any, processor: Any, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    net = kind(config)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.25)  # the library's own 0.02 leaves all outputs of so small a model the same
        if hasattr(net, "logit_scale"):
            net.logit_scale.fill_(4.6)  # ln 100, as trained ones have it
        else:
            net.get_output_embeddings().weight.mul_(2.0)
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
