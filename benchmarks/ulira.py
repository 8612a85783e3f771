"""U-LiRA, the strictest attack of `megu compare`, on digits and on 10,000 images of Fashion-MNIST.

    python benchmarks/ulira.py [--out DIR] [--only NAME ...] [--jobs N]

Default settings, no tuning. The control, half of the oracles against the other half, needs 16 seeds, the methods 8. The
seeds had no part in the choice of a default. A run that was killed goes on where it stopped. Writes
benchmarks/ulira.json, from which tables.py makes a table.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import results
import yaml

from megu_cli.errors import ArtifactError
from megu_cli.run import artifacts

HERE = Path(__file__).parent
DIGITS = {"data": {"name": "digits"}, "model": {"name": "small_cnn"}, "train": {"epochs": 30, "batch": 32, "lr": 0.02}}
FASHION = {"data": {"name": "fashion_mnist", "limit": 10_000}, "model": {"name": "small_resnet"}}
RANDOM = {"random": {"fraction": 0.03}}
# The nearest baselines in the large comparison.
NEAREST = ("finetune", "ct", "msg", "mask")
NEAREST_RANDOM = ("finetune", "neggrad_plus", "scrub")
# Name -> settings, methods, seeds.
REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "digits, class 8": ({**DIGITS, "forget": {"classes": ["8"]}}, ("finetune", "mask"), 16),
    "digits, random 3%": ({**DIGITS, "forget": RANDOM}, ("finetune", "mask"), 16),
    "Shirt, 10,000 images": ({**FASHION, "forget": {"classes": ["Shirt"]}}, NEAREST, 8),
    "random 3%, 10,000 images": ({**FASHION, "forget": RANDOM}, NEAREST_RANDOM, 8),
}
# 800 to 815 chose the ridge penalty of `finetune.calibrate`.
SEED = 900


def main(words: list[str] | None = None) -> None:
    """Run what is missing and write the attacks of all requests that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "ulira", metavar="DIR")
    parser.add_argument("--only", nargs="*", choices=tuple(REQUESTS), help="requests to run; none with --only alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells side by side")
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in REQUESTS if arguments.only is None else arguments.only:
        started = time.monotonic()
        command = [sys.executable, "-m", "megu_cli", "compare", "--jobs", str(arguments.jobs)]
        subprocess.run([*command, "-c", config(arguments.out, name)], check=True)
        print(f"{name}: {time.monotonic() - started:.0f} s")
    result = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {package: version(package) for package in ("megu-cli", "torch", "torchvision", "scikit-learn")},
        "requests": {name: found for name in REQUESTS if (found := attacks(folder(arguments.out, name)))},
    }
    if result["requests"]:
        results.write(HERE / "ulira.json", result)


def folder(out: Path, name: str) -> Path:
    """The run directory of a request."""
    return out / name.lower().replace(",", "").replace("%", "").replace(" ", "-")


def config(out: Path, name: str) -> Path:
    """Write the config of a request; its path."""
    settings, others, seeds = REQUESTS[name]
    compared = {"methods": ["original", *others, "megu", "retrain"], "seeds": seeds}
    path = folder(out, name).with_suffix(".yaml")
    whole = {**settings, "seed": SEED, "out": str(folder(out, name).resolve()), "compare": compared}
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


def attacks(run: Path) -> dict[str, dict[str, Any]]:
    """Method -> what the attack found, without the images; empty where there is no finished comparison."""
    try:
        body: dict[str, Any] = artifacts.read_body(run / "compare.json")
    except ArtifactError:
        return {}
    return {
        method: {key: value for key, value in attack.items() if key != "most_told_apart"}
        for method, attack in body["ulira"].items()
    }


if __name__ == "__main__":
    main()
