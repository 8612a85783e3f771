"""What the method costs beside its arithmetic, in figures that docs/benchmarks.md shows.

    python benchmarks/speed.py [--run DIR] [--small] [--only PART ...]

Measures how fast the training loop is against a bare one, whether the cost of the noise is independent of the number of
forgotten images and that of the finetuning linear in its retained images, and what each stage's process costs beside
the stage; the evaluation beside the finetuning; finetuning and retraining on few images; and a folder of a million
images (large.py). From a run directory in which the oracle was trained, --run takes the method's share of retraining.

Everything but that folder is Fashion-MNIST, `small_resnet`, forget Shirt, but for the sizes of D_f, which are of random
requests. What is compared is measured in turn, in one process. Run it on an idle machine. Writes benchmarks/speed.json
and docs/figures/speed.svg; --small is a try that writes both into DIR. With --only, the other parts stay as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import large
import results
import torch
from tables import pyplot, save
from torch import nn
from torch.nn import functional

from megu_cli import training
from megu_cli.config import Config
from megu_cli.errors import MeguError
from megu_cli.execution import Execution
from megu_cli.method import unlearn as unlearning
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.stages import in_group
from megu_cli.pipeline.steps.problem import fresh
from megu_cli.pipeline.steps.problem import problem as problem_of
from megu_cli.request.resolve import resolve
from megu_cli.run import artifacts, writing

HERE = Path(__file__).parent
PACKAGES = ("megu-cli", "torch", "numpy")
# Part -> the arguments that size it.
SIZES = {
    "loops": ("limit", "samples", "forgotten", "retained", "repeat"),
    "judged": ("judged",),
    "few": ("few",),
    "large": ("files", "decoded"),
}
# The least that a process pays that learns anything: torch, and what it imports when an optimizer is made.
_BARE = "import torch; torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1).zero_grad()"


def main(words: list[str] | None = None) -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory with the method and an oracle")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "speed", metavar="DIR", help="a run of its own")
    parser.add_argument("--limit", type=int, default=60_000, metavar="N", help="images to choose from")
    parser.add_argument("--samples", type=int, default=12_000, metavar="N", help="images of a pass of the loops")
    parser.add_argument("--forgotten", type=int, nargs="+", default=[300, 1800, 6000], metavar="N", help="sizes of D_f")
    parser.add_argument("--retained", type=int, nargs="+", default=[6000, 12_000, 24_000], metavar="N",
                        help="retained images per epoch of the finetuning")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each")
    parser.add_argument("--small", action="store_true", help="small sizes, twice: a try")
    parser.add_argument("--judged", type=int, default=10_000, metavar="N", help="training images of the evaluation")
    parser.add_argument("--few", type=int, default=1200, metavar="N", help="training images of the small data")
    parser.add_argument("--files", type=int, default=1_000_000, metavar="N", help="files of the large folder")
    parser.add_argument("--decoded", type=int, default=5000, metavar="N", help="images of a pass that decodes")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), metavar="PART", help=", ".join(SIZES))
    arguments = parser.parse_args(words)
    if arguments.small:
        small = {"limit": 2000, "samples": 640, "forgotten": [20, 100, 400], "retained": [256, 512, 1024], "repeat": 2,
                 "judged": 500, "few": 300, "files": 5000, "decoded": 100}  # fmt: skip
        vars(arguments).update(small)

    target = (arguments.out if arguments.small else HERE) / "speed.json"
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    result |= {
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
        # Of a part that is not measured now, they stay.
        "sizes": {
            **result.get("sizes", {}),
            **{key: getattr(arguments, key) for part in arguments.only for key in SIZES[part]},
        },
    }
    out, repeat, wanted = arguments.out.resolve(), arguments.repeat, arguments.only
    if "loops" in wanted:
        work = prepared(arguments)
        result |= {
            "overhead": overheads(work.config.out, repeat),
            "bare_process": [timed(subprocess.run, [sys.executable, "-c", _BARE]) for _ in range(repeat)],
            "loop": loop(work, arguments.samples, repeat),
            "noise": noise(work, arguments.forgotten, repeat),
            "finetune": finetune(work, arguments.retained, repeat),
        }
    if "judged" in wanted:
        result["judged"] = judged(out / "judged", arguments.judged, repeat)
    if "few" in wanted:
        result["few"] = few(out / "few", arguments.few)
    if "large" in wanted:
        result["large"] = large.measured(out / "large", arguments.files, arguments.decoded, repeat)
    if arguments.run:
        result["share"] = share(arguments.run)
    results.write(target, result)
    drawing = (arguments.out if arguments.small else HERE.parent / "docs") / "figures" / "speed.svg"
    if "loop" in result:
        draw(result, drawing)
    print(told(result))
    print(f"wrote {target}")


def prepared(arguments: argparse.Namespace) -> RunContext:
    """A run directory with an original of one epoch: what things cost does not depend on its accuracy."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = Config.model_validate(
        {
            "out": arguments.out.resolve(),
            "data": {"name": "fashion_mnist", "limit": arguments.limit},
            "model": {"name": "small_resnet"},
            "forget": {"classes": ["Shirt"]},
            "train": {"epochs": 1},
        }
    )
    # JSON is YAML: what the processes of `overheads` read.
    (config.out / "speed.yaml").write_text(config.model_dump_json(), encoding="utf-8")
    work = RunContext.open(config)
    with writing.locked(config.out):
        Pipeline(work, print).run(goals=["finetune"])
    work.runtime.start()
    work.preload()
    return work


def overheads(out: Path, repeat: int) -> dict[str, dict[str, list[float]]]:
    """Stage -> seconds of `megu STAGE` as a process, of the stage within it, and the difference."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeat):
        for name in in_group("method"):
            words = [sys.executable, "-m", "megu_cli", name, "-c", out / "speed.yaml", "-o", out, "--force", "--quiet"]
            started = time.perf_counter()
            subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
            wall = time.perf_counter() - started
            entry = json.loads((out / "runs.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            own = found.setdefault(name, {"process": [], "stage": [], "overhead": []})
            for key, seconds in (("process", wall), ("stage", entry["seconds"]), ("overhead", wall - entry["seconds"])):
                own[key].append(round(seconds, 3))
    return found


def loop(work: RunContext, samples: int, repeat: int) -> dict[str, Any]:
    """Seconds of `train_classifier` and of a bare loop over the same tensors in the same order, and their ratio.

    Raises:
        MeguError: The two end with different weights: they would not have done the same work.
    """
    split, recipe, seed = work.inputs.data.train, work.config.train, work.config.seed
    index = torch.where(work.inputs.data.trainable)[0][:samples]
    pixels = torch.cat(list(split.images.batches([torch.arange(len(split))])))
    settings = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    once = recipe.model_copy(update={"epochs": 1, "augment": "none"})

    def ours(model: nn.Module) -> None:
        training.train_classifier(model, split, index, once, label="train", execution=Execution(seed=seed))

    def bare(model: nn.Module) -> None:
        order = training.shuffled(index, len(index), recipe.batch, seed, "train", 0)
        optimizer = torch.optim.SGD(model.parameters(), **settings, nesterov=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=len(order))
        model.train()
        for positions in order:
            x = ((pixels[positions].float() / 255) - split.mean) / split.std
            loss = functional.cross_entropy(
                model(x.contiguous(memory_format=torch.channels_last)), split.labels[positions]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    seconds: dict[str, list[float]] = {"megu": [], "bare": []}
    for turn in range(repeat + 1):  # the first is to warm up
        models = {"megu": fresh(work, "train"), "bare": fresh(work, "train")}
        for name, run in (("megu", ours), ("bare", bare)):
            took = timed(run, models[name])
            if turn:
                seconds[name].append(took)
        for one, other in zip(models["megu"].parameters(), models["bare"].parameters(), strict=True):
            if not torch.equal(one, other):
                raise MeguError("the bare loop ends with other weights than train_classifier")
    ratios = [bare_s / megu_s for megu_s, bare_s in zip(seconds["megu"], seconds["bare"], strict=True)]
    return {**seconds, "images": len(index), "throughput": ratios, "median": statistics.median(ratios)}


def noise(work: RunContext, sizes: list[int], repeat: int) -> dict[int, list[float]]:
    """Number of forgotten images -> seconds of the noise stage, both noises trained; the labels are arbitrary."""
    problem, model, classes = problem_of(work), work.original(), len(work.inputs.data.classes)
    settings = problem.noise.model_copy(update={"use": "both"})
    problems = {n: replace(problem, noise=settings, request=resolve(work.inputs.data, count=n)) for n in sizes}
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeat):
        for n, own in problems.items():
            labels = (own.true + 1) % classes
            seconds[n].append(timed(unlearning.noise_pair, own, model, labels))
    return seconds


def finetune(work: RunContext, budgets: list[int], repeat: int) -> dict[int, list[float]]:
    """Retained images per epoch -> seconds of the finetuning, without the validation after each epoch."""
    problem, out = problem_of(work), work.directory.out
    made = {name: artifacts.read(out / f"{name}.safetensors") for name in ("transition", "labels", "noise")}
    labels = unlearning.Labels(made["labels"].body["mode"], made["labels"].tensors["perturbing"])
    matrix, request = made["transition"].tensors["transition"], problem.request
    # Validation costs the same whatever the budget is.
    request = replace(request, validation=request.validation[:0])
    problems = {}
    for n in budgets:
        settings = problem.finetune.model_copy(update={"retain_fraction": n / len(request.retain)})
        problems[n] = replace(problem, request=request, finetune=settings)
    seconds: dict[int, list[float]] = {n: [] for n in budgets}
    for _ in range(repeat):
        for n, own in problems.items():
            model, pair = work.original(), made["noise"].tensors
            seconds[n].append(timed(unlearning.align, own, model, matrix, labels, pair))
    return seconds


def beside_an_oracle(out: Path, images: int) -> Path:
    """Config of a finished run on so many images, with an oracle."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "out": str(out / "run"),
        "data": {"name": "fashion_mnist", "limit": images},
        "model": {"name": "small_resnet"},
        "forget": {"classes": ["Shirt"]},
        "eval": {"oracle": True},
    }
    file = out / "megu.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    megu("run", file)
    return file


def megu(command: str, file: Path, *words: str) -> str:
    """What a command prints."""
    call = [sys.executable, "-m", "megu_cli", command, "-c", str(file), *words]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout


def seconds_of(run: Path) -> dict[str, float]:
    """Stage -> its seconds, the last time that it ran."""
    lines = (run / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["stage"]: entry["seconds"] for entry in map(json.loads, lines) if "seconds" in entry}


def judged(out: Path, images: int, repeat: int) -> dict[str, list[float]]:
    """Seconds of the stages of the method, and of the evaluation beside an oracle, in turn."""
    file = beside_an_oracle(out, images)
    found: dict[str, list[float]] = {name: [] for name in (*in_group("method"), "eval")}
    for _ in range(repeat):
        for name in found:
            megu(name, file, "--force", "--quiet")
        latest = seconds_of(out / "run")
        for name, own in found.items():
            own.append(latest[name])
    return found


def few(out: Path, images: int) -> dict[str, Any]:
    """Steps and seconds of the method and of retraining where there are few images."""
    file = beside_an_oracle(out, images)
    planned = json.loads(megu("run", file, "--dry-run", "--force", "--json"))
    steps = {stage["stage"]: stage["steps"] for stage in planned["plan"] if stage["steps"]}
    return {"steps": steps, "seconds": seconds_of(out / "run")}


def timed(work: Callable[..., object], *given: object) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work(*given)
    return round(time.perf_counter() - started, 4)


def share(run: Path) -> dict[str, Any]:
    """The method's seconds and those of retraining, from a run directory in which both were measured.

    Raises:
        MeguError: They were not, or not on the same machine.
    """
    times = artifacts.read_body(run / "eval.json")["time"]
    if times["time_ratio"] is None:
        raise MeguError(f"{run} has no oracle and method that were timed on one machine", "`megu run` there first.")
    return {key: times[key] for key in ("time_ratio", "oracle_s", *(f"{name}_s" for name in in_group("method")))}


def slope(seconds: dict[int, list[float]]) -> tuple[float, float]:
    """(a, b) of the straight line a + b n through the medians, by least squares."""
    line = statistics.linear_regression([int(n) for n in seconds], [statistics.median(own) for own in seconds.values()])
    return line.intercept, line.slope


def told(result: dict[str, Any]) -> str:
    """The figures in words."""
    lines = []
    if "loop" in result:
        lines += told_of_loops(result)
    if result.get("share"):
        lines.append(f"labels, noise and finetune: {result['share']['time_ratio']:.1%} of retraining")
    if "judged" in result:
        medians = {name: statistics.median(own) for name, own in result["judged"].items()}
        whole = sum(medians[name] for name in in_group("method"))
        lines.append(
            f"eval beside an oracle, {result['sizes']['judged']:,} training images: {medians['eval']:.1f} s, "
            f"{medians['eval'] / medians['finetune']:.1f} times the finetuning ({medians['finetune']:.1f} s), "
            f"{medians['eval'] / whole:.1f} times labels, noise and finetune"
        )
    if "few" in result:
        steps, took = result["few"]["steps"], result["few"]["seconds"]
        whole = sum(took[name] for name in in_group("method"))
        lines.append(
            f"{result['sizes']['few']:,} images: {steps['finetune']} steps of finetuning, {steps['oracle']} of "
            f"retraining; {took['finetune']:.1f} s, with labels and noise {whole:.1f} s, and {took['oracle']:.1f} s"
        )
    if "large" in result:
        lines += told_of_large(result["large"])
    return "\n".join(lines)


def told_of_loops(result: dict[str, Any]) -> list[str]:
    """The figures of the loops and the stages' processes in words."""
    lines = [f"training loop: {result['loop']['median']:.1%} of a bare loop's throughput"]
    for name, own in result["overhead"].items():
        lines.append(f"{name}: {statistics.median(own['overhead']):.1f} s beside the stage's own")
    lines.append(f"torch with an optimizer, and nothing else: {statistics.median(result['bare_process']):.1f} s")
    for name in ("noise", "finetune"):
        medians = ", ".join(f"{n}: {statistics.median(own):.2f} s" for n, own in result[name].items())
        lines.append(f"{name}, by {'forgotten' if name == 'noise' else 'retained'} images: {medians}")
    return lines


def told_of_large(found: dict[str, Any]) -> list[str]:
    """The figures of the large folder in words."""
    ours, theirs = found["decoding"]["megu"], found["decoding"]["torchvision"]
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return [
        f"`megu status`, {found['images']:,} files in 1,000 classes, nothing changed: {found['status']:.1f} s, "
        f"{found['status_mib']:.0f} MiB; the first command, which reads every file: {found['first']:.0f} s "
        f"(reading and hashing them with all cores, and nothing else: {found['reading']:.0f} s)",
        f"decoding: {statistics.median(ours):.0f} images a second, {statistics.median(ratios):.2f} of torchvision's "
        "ImageFolder and DataLoader with the same workers",
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds by size with the line through their medians; beside them what a process costs beside its stage."""
    figure, axes = pyplot().subplots(1, 3, figsize=(9.6, 2.8), layout="constrained")
    for axis, name, word in zip(axes, ("noise", "finetune"), ("forgotten", "retained"), strict=False):
        found = result[name]
        for n, own in found.items():
            axis.plot([int(n)] * len(own), own, "o", color="tab:blue", markersize=3)
        start, rise = slope(found)
        largest = max(map(int, found))
        axis.plot([0, largest], [start, start + rise * largest], color="black", linewidth=0.6)
        axis.set_xlabel(f"{word} images", fontsize=8)
        axis.set_title(name, fontsize=9)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    last = axes[2]
    for place, own in enumerate(result["overhead"].values()):
        last.plot([place] * len(own["overhead"]), own["overhead"], "o", color="tab:blue", markersize=3)
    last.axhline(3, color="tab:red", linewidth=0.6)
    last.set_xticks(range(len(result["overhead"])), list(result["overhead"]))
    last.set_title("process beside its stage", fontsize=9)
    last.set_ylim(bottom=0)
    for axis in axes:
        axis.set_ylabel("seconds", fontsize=8)
        axis.tick_params(labelsize=7)
    save(figure, path)


if __name__ == "__main__":
    main()
