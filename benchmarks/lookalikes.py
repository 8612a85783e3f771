"""How well `megu check-data` finds copies of forgotten images: Fashion-MNIST at 64 pixels, and digits at 8.

Writes benchmarks/lookalikes.json, which docs/records.md quotes. Run: python benchmarks/lookalikes.py
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megu_cli.record import fingerprints
from megu_cli.record.returned import FARTHEST, Known, search

ROOT = Path("/usr/share/datasets/fashion-mnist")
FORGOTTEN, OTHERS = 100, 10_000
# Seeds of the forgotten images. FARTHEST was chosen on the first.
SEEDS = (0, 1, 2, 3)
Change = Callable[[Image.Image], Image.Image]


def encoded(image: Image.Image, form: str, **settings: object) -> Image.Image:
    """The image as it is read back from a file."""
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return Image.open(io.BytesIO(stream.getvalue()))


def sized(side: int) -> Change:
    """A resize to a number of pixels a side."""
    return lambda image: image.resize((side, side), Image.Resampling.LANCZOS)


def shifted(image: Image.Image) -> Image.Image:
    """The image cropped by 4 of 64 pixels on one side, and brought back to size."""
    return image.crop((4, 0, 64, 64)).resize((64, 64))


# What a copy is likely to have gone through: one of each is given to the images in turn.
COPIES: dict[str, Change] = {
    "JPEG, quality 90": lambda image: encoded(image, "JPEG", quality=90),
    "JPEG, quality 50": lambda image: encoded(image, "JPEG", quality=50),
    "JPEG, quality 30": lambda image: encoded(image, "JPEG", quality=30),
    "WebP, quality 50": lambda image: encoded(image, "WEBP", quality=50),
    "GIF": lambda image: encoded(image, "GIF"),
    "RGB": lambda image: image.convert("RGB"),
    "32 pixels": sized(32),
    "48 pixels": sized(48),
    "128 pixels": sized(128),
    "256 pixels, JPEG 75": lambda image: encoded(sized(256)(image), "JPEG", quality=75),
    "32 pixels, JPEG 50": lambda image: encoded(sized(32)(image), "JPEG", quality=50),
}
# What it is not made for.
EDITS: dict[str, Change] = {
    "cropped by 6%": shifted,
    "mirrored": ImageOps.mirror,
    "turned by 5 degrees": lambda image: image.rotate(5),
    "inverted": ImageOps.invert,
    "16 pixels": sized(16),
}


def fashion(name: str) -> list[Image.Image]:
    """Images of Fashion-MNIST, enlarged to 64 pixels."""
    with gzip.open(ROOT / f"{name}-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read()[16:], np.uint8).reshape(-1, 28, 28)
    return [Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in pixels]


def known_of(images: list[Image.Image], files: list[bytes]) -> Known:
    """What forgotten.json would hold of images."""
    looks = [look for image in images if (look := fingerprints.look(image))]
    digests = frozenset(map(fingerprints.bytes_digest, files))
    return Known(digests, looks=np.frombuffer(bytes.fromhex("".join(looks)), np.uint8).reshape(-1, 32))


def png(image: Image.Image) -> bytes:
    """A PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def apart(known: Known, image: Image.Image) -> float:
    """How far an image looks from the nearest forgotten one."""
    look = fingerprints.look(image)
    return 1 if look is None else round(fingerprints.difference(known.looks, look), 3)


def drawn(seed: int, details: int) -> Image.Image:
    """A picture of soft spots: random grey of a few details a side, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (details, details), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)


def measured(forgotten: list[Image.Image], others: list[Image.Image]) -> dict[str, object]:
    """Copies found, and false alarms, for one choice of forgotten images."""
    files = [png(image) for image in forgotten]
    known = known_of(forgotten, files)
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(files):
            Path(folder, f"{i}.png").write_bytes(content)
        exact = sum(found.how == "the same bytes" for found in search(Path(folder), known).found)
    changes = list(COPIES.values())
    mixed = [apart(known, changes[i % len(changes)](image)) for i, image in enumerate(forgotten)]
    others_apart = sorted(apart(known, image) for image in others)
    return {
        "byte_copies_found": exact,
        "copies_found": sum(far <= FARTHEST for far in mixed),
        "false_alarms": sum(far <= FARTHEST for far in others_apart),
        "nearest_others": others_apart[:5],
        "of": {"byte_copies": len(files), "copies": len(mixed), "others": len(others_apart)},
        "found_by_change": {
            name: sum(apart(known, change(image)) <= FARTHEST for image in forgotten)
            for name, change in {**COPIES, **EDITS}.items()
        },
    }


def main() -> None:
    """Measure, print and write."""
    from sklearn.datasets import load_digits

    train, test = fashion("train"), fashion("t10k")[:OTHERS]
    result: dict[str, object] = {"farthest": FARTHEST}
    for seed in SEEDS:
        chosen = random.Random(seed).sample(range(len(train)), FORGOTTEN)
        result[f"fashion_mnist_64 seed {seed}"] = measured([train[i] for i in chosen], test)
    for details in (4, 6, 10):
        soft = [drawn(seed, details) for seed in range(1100)]
        result[f"soft spots, {details} a side"] = measured(soft[:FORGOTTEN], soft[FORGOTTEN:])
    digits = [Image.fromarray((image * 15).astype(np.uint8)) for image in load_digits().images]
    result["digits of 8 pixels"] = measured(digits[:FORGOTTEN], digits[FORGOTTEN:])
    text = json.dumps(result, indent=1)
    print(text)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
