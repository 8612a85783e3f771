"""Default settings on Fashion-MNIST, 10,000 images, no tuning: every class forgotten in turn, and random shares.

    python benchmarks/defaults.py [--out DIR] [--only NAME ...]

Each request is a run directory of `megu compare`; all have the same seeds. The originals are trained once, and shared.
A run that was killed goes on where it stopped. Writes benchmarks/defaults.json, from which tables.py makes tables.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import results
import yaml

from megu_cli.compare import figures
from megu_cli.errors import ArtifactError
from megu_cli.run import artifacts

HERE = Path(__file__).parent
# The classes on which the defaults were chosen come last.
CLASSES = ("Dress", "Trouser", "Pullover", "Sandal", "Shirt", "Bag", "Ankle boot", "Coat", "T-shirt/top", "Sneaker")
DEVELOPMENT = ("Coat", "T-shirt/top", "Sneaker")
SHARES = {"random 1%": 0.01, "random 3%": 0.03, "random 10%": 0.1}
# Of single images little is forgotten, and seeds differ by more than methods do: more of them.
CLASS_METHODS, CLASS_SEEDS = ("original", "retrain", "mask", "finetune", "ct", "msg", "megu"), 2
SHARE_METHODS, SHARE_SEEDS = ("original", "retrain", "finetune", "megu"), 5
SEED = 700
FIGURES = (
    *("avg_gap", "js_divergence", "agreement", "probe_acc", "retain_test_acc", "retain_train_acc"),
    *("forget_train_acc", "mia_entropy_lr", "mia_loss_auc"),
)


def main(words: list[str] | None = None) -> None:
    """Run what is missing and write the figures of all requests that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "defaults", metavar="DIR")
    parser.add_argument(
        "--only", nargs="*", choices=(*CLASSES, *SHARES), help="requests to run; none with --only alone"
    )
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    first = folder(arguments.out, CLASSES[0])
    for name in (*CLASSES, *SHARES) if arguments.only is None else arguments.only:
        share_originals(first, folder(arguments.out, name))
        subprocess.run([sys.executable, "-m", "megu_cli", "compare", "-c", config(arguments.out, name)], check=True)
    result = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {package: version(package) for package in ("megu-cli", "torch", "torchvision", "scikit-learn")},
        "classes": {name: found for name in CLASSES if (found := collected(folder(arguments.out, name)))},
        "shares": {name: found for name in SHARES if (found := collected(folder(arguments.out, name)))},
    }
    results.write(HERE / "defaults.json", result)


def folder(out: Path, name: str) -> Path:
    """The run directory of a request."""
    return out / name.lower().replace(" ", "-").replace("/", "-").rstrip("%")


def config(out: Path, name: str) -> Path:
    """Write the config of a request; its path."""
    share = name in SHARES
    settings = {
        "seed": SEED,
        "out": str(folder(out, name).resolve()),
        "data": {"name": "fashion_mnist", "limit": 10_000},
        "model": {"name": "small_resnet"},
        "forget": {"random": {"fraction": SHARES[name]}} if share else {"classes": [name]},
        "compare": {
            "seeds": SHARE_SEEDS if share else CLASS_SEEDS,
            "methods": list(SHARE_METHODS if share else CLASS_METHODS),
        },
    }
    path = folder(out, name).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def share_originals(source: Path, target: Path) -> None:
    """Copy the originals, which do not depend on the request, and the record of what they took."""
    for file in (
        "original.safetensors",
        *(f"compare/{SEED + i}/original.safetensors" for i in range(1, SHARE_SEEDS)),
        "runs.jsonl",
    ):
        if (source / file).exists() and not (target / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target / file)


def collected(run: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Method -> seed -> figure of a finished comparison; empty where there is none."""
    try:
        body: dict[str, Any] = artifacts.read_body(run / "compare.json")
    except ArtifactError:
        return {}
    return {
        method: {
            seed: {key: None if cell_figures.get(key) is None else round(cell_figures[key], 5) for key in FIGURES}
            for seed, cell in row["seeds"].items()
            if (cell_figures := figures(cell))
        }
        for method, row in body["methods"].items()
        if method in CLASS_METHODS
    }


if __name__ == "__main__":
    main()
