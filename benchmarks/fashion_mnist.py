"""The first figures of benchmarks/lab.md: Fashion-MNIST, all 60,000 images, a small ResNet.

    python benchmarks/fashion_mnist.py [--out DIR] [--limit N]

Class-wise (Shirt) with three seeds, and with it the noise floor of three oracles; then sub-class, random 3% and listed
images with one seed. Every cell is a run directory: killed and started again, it goes on where it stopped. Writes
benchmarks/fashion_mnist.json (with --limit: into DIR, so that a short try replaces no figures).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import results

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "fashion_mnist"
# Listed images and the sub-class are judged against the original alone: they are to run to the end.
CELLS = [("megu", 0), ("megu", 1), ("megu", 2), ("random", 0), ("samples", 0), ("subclass", 0)]
WITHOUT_ORACLE = {"samples", "subclass"}
KEPT = ("original", "mask", "unlearned", "oracle", "comparison", "time", "request")


def main() -> None:
    """Run all cells and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "runs")
    parser.add_argument("--limit", type=int, help="training images, for a short try")
    parser.add_argument("--only", nargs="*", help="examples to run, e.g. megu random")
    arguments = parser.parse_args()

    cells = {}
    for name, seed in CELLS:
        if arguments.only and name not in arguments.only:
            continue
        folder = arguments.out / f"{name}-{seed}"
        share_original(arguments.out / f"megu-{seed}", folder, name)
        cells[f"{name}-{seed}"] = run(name, seed, folder, arguments.limit)
    figures = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {package: version(package) for package in ("megu-cli", "torch", "torchvision", "scikit-learn")},
        "limit": arguments.limit,
        "cells": cells,
        "weights": compare_weights(arguments.out),
        "noise_floor": noise_floor(arguments.out, arguments.limit),
    }
    target = arguments.out if arguments.limit or arguments.only else ROOT / "benchmarks"
    results.write(target / "fashion_mnist.json", figures)
    print(json.dumps(figures, indent=1))


def share_original(source: Path, folder: Path, name: str) -> None:
    """The original does not depend on the request: hand over the one that is there (coarse labels have their own)."""
    if name not in ("megu", "subclass") and (source / "original.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "original.safetensors").exists():
            shutil.copy(source / "original.safetensors", folder)


def run(name: str, seed: int, folder: Path, limit: int | None) -> dict:
    """One `megu run`, in a process of its own; its eval.json without what no table shows."""
    command = [sys.executable, "-m", "megu_cli", "run", "-c", EXAMPLES / f"{name}.yaml", "-o", folder, "--seed", seed]
    command += ["--set", f"eval.oracle={str(name not in WITHOUT_ORACLE).lower()}"]
    command += ["--json", *(["--set", f"data.limit={limit}"] if limit else [])]
    answer = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True)
    result = json.loads(answer.stdout)
    return {key: result[key] for key in KEPT if key in result}


def compare_weights(out: Path) -> dict[str, dict]:
    """How many tensors of the unlearned model differ from the original's (the mask changes none)."""
    from safetensors.torch import load_file

    result = {}
    for folder in sorted(path for path in out.iterdir() if (path / "model.safetensors").exists()):
        original, unlearned = (load_file(folder / f"{name}.safetensors") for name in ("original", "model"))
        result[folder.name] = {
            "tensors": len(original),
            "changed": sum(not original[key].equal(unlearned[key]) for key in original),
        }
    return result


def noise_floor(out: Path, limit: int | None) -> dict | None:
    """What two oracles that differ in the seed only are apart, over all pairs: methods nearer than this are equal."""
    import torch

    from megu_cli.config import load_config
    from megu_cli.evaluation import distance
    from megu_cli.pipeline.context import RunContext
    from megu_cli.training import predict

    folders = [out / f"megu-{seed}" for seed in range(3)]
    if not all((folder / "eval.json").exists() for folder in folders):
        return None
    overrides = [f"data.limit={limit}"] if limit else []
    work = RunContext.open(load_config(EXAMPLES / "megu.yaml", overrides, {"out": out / "megu-0"}))
    work.runtime.start()
    says, metrics = [], []
    for folder in folders:
        from safetensors.torch import load_file

        model = work.load(load_file(folder / "oracle.safetensors"), "oracle")
        logits = predict(
            model, work.inputs.data.train, work.inputs.request.forget, classes=len(work.inputs.data.classes)
        ).logits
        says.append(logits.softmax(1))
        metrics.append(json.loads((folder / "eval.json").read_text())["oracle"])
    pairs = list(itertools.combinations(range(3), 2))
    values = {
        "js_divergence": [distance.js_divergence(says[a], says[b]) for a, b in pairs],
        "agreement": [distance.agreement(says[a], says[b]) for a, b in pairs],
        "avg_gap": [distance.avg_gap(metrics[a], metrics[b]) for a, b in pairs],
    }
    return {name: {"pairs": v, "mean": float(torch.tensor(v).mean())} for name, v in values.items()}


if __name__ == "__main__":
    main()
