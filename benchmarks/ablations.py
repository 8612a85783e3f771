"""What each part of the method earns: one setting changed at a time, on 10,000 images of Fashion-MNIST.

    python benchmarks/ablations.py [--only coat random-3] [--seeds N]

Forgets Coat, and a random 3%, from one original per seed, and judges each setting against one oracle. Labels, noise,
original and oracle are made anew only where a setting changes them. Killed and started again, it goes on where it
stopped. Writes benchmarks/ablations.json after each request; a try with another size, seeds or keys writes to DIR.

Images per class (mllm.images_per_class) are not varied: the ratings are recorded, and nobody is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import results
import torch

from megu_cli import training
from megu_cli.compare import Arena, distances, paired, summary
from megu_cli.compare.methods import Contender
from megu_cli.config import Config, get
from megu_cli.data import Dataset
from megu_cli.evaluation.measure import described
from megu_cli.execution.runtime import generator
from megu_cli.mllm.recorded import Recorded
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.run import artifacts, writing

HERE = Path(__file__).parent
PACKAGES = ("megu-cli", "torch", "torchvision", "numpy", "scikit-learn", "scipy")
REQUESTS: dict[str, dict[str, Any]] = {"coat": {"classes": ["Coat"]}, "random-3": {"random": {"fraction": 0.03}}}
DEFAULT = "default"
# What is handed over from the default setting; what does not fit a setting is made anew.
HANDED = ("similarity.json", "transition.safetensors", "labels.safetensors", "noise.safetensors", "runs.jsonl")
RATINGS = ("uniform", "shuffled", "confusions")

# Key -> values beside the default's.
SHARED: dict[str, tuple[Any, ...]] = {
    "mllm.ratings": RATINGS,
    "labels.source": ("transition+prediction", "transition", "prediction", "random"),
    "labels.proxy.networks": (1,),
    "labels.proxy.ratings": (0.0, 0.5),
    "labels.proxy.prediction": (0.0, 0.2),
    "transition.temperature": (1.0, 10.0),
    "finetune.weight": (0.05, 0.5),
    "finetune.retain_fraction": (0.35, 2.8),
    "finetune.epochs": (2, 4),
}
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "coat": {
        "noise.use": ("both", "positive", "negative"),  # by default none
        **SHARED,
        "noise.negative": ("away",),
        "noise.strength": ("full",),
        "noise.penalty": (1.0,),
        "noise.batch": (1,),
        "noise.steps": (240,),
        "finetune.clean": (0.0, 1.0),
        "finetune.adversary": (0.0,),
        "finetune.reassign": (False,),
        "finetune.beta": (0.0,),
    },
    # Its labels are not hard: no adversary, nothing is reassigned, and by default there is no noise to vary.
    "random-3": {
        "noise.use": ("both", "positive", "negative"),  # by default none
        **SHARED,
        "labels.mode": ("hard", "soft"),
        "labels.keep": (0.8, 0.95, 1.0),
    },
}


def main(words: list[str] | None = None) -> None:
    """Run all settings of all requests and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(REQUESTS), default=list(REQUESTS), help="requests")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="vary only these keys, e.g. noise.use")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "ablations", metavar="DIR")
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help="training images")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--first-seed", type=int, default=320, metavar="N")
    arguments = parser.parse_args(words)

    is_try = (arguments.limit, arguments.seeds, arguments.first_seed, arguments.keys) != (10_000, 3, 320, None)
    target = (arguments.out if is_try else HERE) / "ablations.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(target.read_text(encoding="utf-8"))["requests"] if target.exists() else {}
    for name in arguments.only:
        known[name] = ablated(name, arguments)
        result = {
            "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
            "versions": {package: version(package) for package in PACKAGES},
            "requests": known,
        }
        results.write(target, result)
    print(f"wrote {target}")


def ablated(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of every setting for one request, and beside them how each differs from the default's."""
    config = configured(name, arguments)
    varied = settings(config, GRIDS[name], arguments.keys)
    base = RunContext.open(config)
    base.runtime.start()
    started = time.perf_counter()
    with writing.locked(config.out):
        Pipeline(base, print).run(goals=["transition"])
        cells: dict[str, dict[str, dict[str, Any]]] = {}
        floor, retrain = {}, Contender("retrain", "retrain", {})
        arenas = [Arena(base, arguments.first_seed + i, print) for i in range(arguments.seeds)]
        for arena in arenas:
            share_original(arena, arguments.out / "originals")
            arena.prepare()
        for place, arena in enumerate(arenas):
            rival = arenas[(place + 1) % len(arenas)]
            floor[str(arena.seed)] = figures(arena, arena.cell(retrain, rival if rival is not arena else None))
            for label, changes in varied.items():
                given = {
                    key: ratings(arena, value) if key == "mllm.ratings" else value for key, value in changes.items()
                }
                hand_over(arena.folder / DEFAULT, arena.folder / label)
                cell = arena.cell(Contender(label, "megu", given), None)
                cells.setdefault(label, {})[str(arena.seed)] = figures(arena, cell)
            arena.forget_loaded()

    apart = {
        label: {seed: distances(row, floor[seed]) for seed, row in by_seed.items()} for label, by_seed in cells.items()
    }
    return {
        "request": described(base.inputs.data, base.inputs.request),
        "images": len(base.inputs.data.train),
        "seeds": [arena.seed for arena in arenas],
        "seconds": round(time.perf_counter() - started, 1),
        "retrain": summary(list(floor.values())),
        "settings": {
            label: {
                "changes": changes,
                **summary(list(cells[label].values())),
                "from_default": paired(apart[label], apart[DEFAULT]) if label != DEFAULT else {},
                "seeds": cells[label],
            }
            for label, changes in varied.items()
        },
    }


def configured(name: str, arguments: argparse.Namespace) -> Config:
    """The config of a request, with all of the method's settings as they are by default."""
    return Config.model_validate(
        {
            "seed": arguments.first_seed,
            "out": arguments.out / f"{name}-{arguments.limit}",
            "data": {"name": "fashion_mnist", "limit": arguments.limit},
            "model": {"name": "small_resnet"},
            "forget": REQUESTS[name],
        }
    )


def settings(config: Config, grid: dict[str, tuple[Any, ...]], keys: list[str] | None) -> dict[str, dict[str, Any]]:
    """Label -> what it changes; the default, from which labels and noise are handed over, first."""
    return {DEFAULT: {}} | {
        f"{key}={value}": {key: value}
        for key, values in grid.items()
        for value in values
        if (keys is None or key in keys) and value != get(config, key)
    }


def figures(arena: Arena, cell: artifacts.Artifact) -> dict[str, Any]:
    """All figures of a cell by name."""
    body = cell.body
    return {**body["metrics"], **body["comparison"], **body["entanglement"], **arena.clock(cell)}


def share_original(arena: Arena, store: Path) -> None:
    """Hand the original of a seed from one request to the next: it does not depend on what is forgotten."""
    mine, kept = (
        arena.context.inputs.original.path,
        store / f"{arena.seed}-{len(arena.context.inputs.data.train)}.safetensors",
    )
    mine.parent.mkdir(parents=True, exist_ok=True)
    if not mine.exists() and kept.exists():
        shutil.copy(kept, mine)
    Pipeline(arena.context, print).run(goals=["train"])
    store.mkdir(exist_ok=True)
    shutil.copy(mine, kept)


def hand_over(source: Path, target: Path) -> None:
    """Copy what a setting may have in common with the default."""
    if source.exists() and not target.exists():
        target.mkdir()
        for name in HANDED:
            shutil.copy(source / name, target)


def ratings(arena: Arena, kind: str) -> Path:
    """A file of ratings that no MLLM gave: all alike, the recorded ones shuffled, or the original's confusions."""
    data = arena.context.inputs.data
    recorded = Recorded(arena.context.inputs.ratings_file)
    if kind == "uniform":
        scores = {c: {k: 5.0 for k in data.classes if k != c} for c in data.classes}
    elif kind == "shuffled":
        scores = {c: shuffled(row, arena.seed, c) for c, row in recorded.scores.items()}
    else:
        scores = confusions(arena.context.original(), data)
    told = {
        "uniform": "nobody: every rating is 5",
        "shuffled": f"{recorded.rater}, each row shuffled (seed {arena.seed})",
        "confusions": "the original model: mean log-probability on training images of the class, from 0 to 10",
    }[kind]
    path = arena.folder / f"ratings-{kind}.json"
    path.write_text(json.dumps({"classes": data.classes, "rater": told, "scores": scores}), encoding="utf-8")
    return path


def shuffled(row: dict[str, float], seed: int, concept: str) -> dict[str, float]:
    """The ratings of a row given to other classes."""
    order = torch.randperm(len(row), generator=generator(seed, "ablations", concept)).tolist()
    values = list(row.values())
    return {name: values[i] for name, i in zip(row, order, strict=True)}


def confusions(model: torch.nn.Module, data: Dataset) -> dict[str, dict[str, float]]:
    """Class -> other class -> mean log-probability that the model gives it on the class, scaled to 0 to 10."""
    index = torch.where(data.trainable)[0]
    says = training.predict(model, data.train, index, classes=len(data.classes)).logits.double().log_softmax(1)
    labels = data.train.labels[index]
    scores = {}
    for c, name in enumerate(data.classes):
        row = says[labels == c].mean(0)
        others = torch.arange(len(row)) != c
        low, high = row[others].min(), row[others].max()
        scaled = (10 * (row - low) / (high - low)).clamp(0, 10)
        scores[name] = {other: round(float(scaled[k]), 3) for k, other in enumerate(data.classes) if k != c}
    return scores


if __name__ == "__main__":
    main()
