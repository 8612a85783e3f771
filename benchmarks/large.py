"""A folder of very many images, for speed.py: the first command, which reads all of it, `megu status`, and decoding.

Each file is a JPEG of 224 x 224 pixels with its number behind the end of the picture, so that no two are copies.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext

CLASSES, SIDE, BATCH = 1000, 224, 128


def measured(out: Path, images: int, decoded: int, repeat: int) -> dict[str, Any]:
    """Make the folder where it is not there yet, and measure.

    Args:
        out: A folder of its own; it holds the images, and the run directory.
        images: Files in all.
        decoded: Images of a pass of the two readers.
        repeat: Passes of each.

    Returns:
        Seconds of a bare reading and hashing, of the first command, and of `megu status` after it with its peak memory
        in MiB, and images a second of both readers.
    """
    root = out / "images"
    made(root, images)
    config = {
        "out": str((out / "run").resolve()),
        "data": {
            "name": "imagefolder",
            "root": str(root.resolve()),
            "image_size": SIDE,
            "workers": os.cpu_count(),
            "memory_limit": 1e-6,  # everything streams
        },
        "model": {"name": "resnet18"},
        "forget": {"classes": ["class 0000"]},
    }
    file = out / "large.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    bare = reading(root)
    # The first command of a run: it reads every file, and asks nobody for ratings.
    first, _ = command("similarity", file)
    again, memory = command("status", file)
    return {
        "images": images,
        "reading": bare,
        "first": first,
        "status": again,
        "status_mib": memory,
        "decoding": decoding(file, root, decoded, repeat),
    }


def made(root: Path, images: int) -> None:
    """Write the files, train/CLASS/NUMBER.jpg and a fiftieth of them under test/, unless they are there."""
    done = root / f".{images}"
    if done.exists():
        return
    per_class = images // CLASSES
    smooth = torch.rand(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for number, colours in enumerate(smooth):
        pixels = torch.nn.functional.interpolate(colours[None], (SIDE, SIDE), mode="bicubic")[0].clamp(0, 1)
        content = io.BytesIO()
        Image.fromarray(np.uint8(255 * pixels.permute(1, 2, 0))).save(content, "JPEG", quality=75)
        test = max(1, per_class // 50)
        for side, numbers in (("test", range(test)), ("train", range(test, per_class))):
            folder = root / side / f"class {number:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in numbers:
                unlike = i.to_bytes(4, "big") + number.to_bytes(4, "big")
                (folder / f"{i:06d}.jpg").write_bytes(content.getvalue() + unlike)
    done.touch()


def reading(root: Path) -> float:
    """Seconds to read and hash every file with all cores."""
    folders = [str(folder) for side in ("train", "test") for folder in sorted((root / side).iterdir())]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_hashed, folders[:2]))  # the processes start
        started = time.perf_counter()
        list(pool.map(_hashed, folders, chunksize=8))
        return round(time.perf_counter() - started, 2)


def _hashed(folder: str) -> None:
    for path in Path(folder).iterdir():
        hashlib.sha256(path.read_bytes()).digest()


def command(name: str, file: Path) -> tuple[float, float]:
    """Seconds of a command of megu as a process, and its peak memory in MiB."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "megu_cli", name, "-c", str(file)]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, state, usage = os.wait4(child.pid, 0)
    code = os.waitstatus_to_exitcode(state)
    if code not in (0, 1):  # 1: `megu status` found that stages are missing
        raise subprocess.CalledProcessError(code, words)
    return round(time.perf_counter() - started, 2), round(usage.ru_maxrss / 1024, 1)


def decoding(file: Path, root: Path, images: int, repeat: int) -> dict[str, list[float]]:
    """Images a second of megu's split and of torchvision's ImageFolder with a DataLoader, in turn, same workers."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    work = RunContext.open(load_config(file))
    split, workers = work.inputs.data.train, work.config.data.workers
    index = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:images]
    to_tensor = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.PILToTensor()])
    folder = datasets.ImageFolder(str(root / "train"), to_tensor)
    rates: dict[str, list[float]] = {"megu": [], "torchvision": []}
    for turn in range(repeat + 1):  # the first is to warm up
        for name, batches in (
            ("megu", split.images.batches(list(index.split(BATCH)))),
            ("torchvision", DataLoader(Subset(folder, index.tolist()), BATCH, num_workers=workers)),
        ):
            started = time.perf_counter()
            seen = sum(len(batch[0] if isinstance(batch, list) else batch) for batch in batches)
            if turn:
                rates[name].append(round(seen / (time.perf_counter() - started), 1))
    return rates
