"""The benchmark: requests of every kind through all methods, tuned by the same rule, over several seeds.

    python benchmarks/benchmark.py [--only CELL...] [--jobs N] [--small]

A cell is a config in benchmarks/fashion_mnist/ (or, with --configs, in another folder), and is run by
`megu compare --tune`: settings are chosen on other seeds, and on at most 10,000 images, than the figures are of. Killed
and started again, it goes on where it stopped. Cells on the same images share the original of each seed.

After every cell all figures that are there go into benchmarks/benchmark.json, which says what is missing; cells that
--only does not name are taken as they were left. A try with other sizes, seeds or methods writes DIR/benchmark.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import results

from megu_cli.compare.methods import chosen
from megu_cli.config import Config, changed, get, load_config
from megu_cli.errors import ArtifactError
from megu_cli.run import artifacts

HERE = Path(__file__).parent
PACKAGES = ("megu-cli", "torch", "torchvision", "numpy", "scikit-learn", "scipy")
# What a cell's figures depend on and a reader wants to know.
SHOWN = ("data.name", "data.limit", "data.superclasses", "model.name", "train", "eval.relearn_epochs")


@dataclass(frozen=True)
class Cell:
    """One request, with all methods and seeds.

    Attributes:
        name: Of its config file.
        file: The config.
        config: The same, with what the command line changes.
        folder: Its run directory.
    """

    name: str
    file: Path
    config: Config
    folder: Path

    @property
    def seeds(self) -> list[int]:
        """Seeds of the table."""
        return [self.config.seed + i for i in range(self.config.compare.seeds)]

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return chosen(self.config.compare.methods)

    def originals(self) -> dict[Path, tuple[int | None, int]]:
        """Where the cell looks for an original -> the number of its images (``None``: all) and its seed."""
        limit, settings = self.config.data.limit, self.config.compare
        folders = {seed: self.folder / "compare" / str(seed) for seed in self.seeds} | {self.seeds[0]: self.folder}
        places: dict[Path, tuple[int | None, int]] = {folder: (limit, seed) for seed, folder in folders.items()}
        fewer = min((n for n in (limit, settings.tune_limit) if n is not None), default=None)
        seed = self.seeds[0] if settings.tune_seed is None else settings.tune_seed
        if (settings.tune_seed, settings.tune_limit) != (None, None):
            places[self.folder / "compare" / f"tune-{seed}"] = (fewer, seed)
        return places


def main() -> None:
    """Run the cells and collect their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=HERE / "fashion_mnist", help="folder of the cells' configs")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="names of configs, e.g. shirt random-3")
    parser.add_argument("--out", type=Path, default=HERE / "runs", metavar="DIR", help="where the run directories are")
    parser.add_argument("--small", action="store_true", help="10,000 images for every cell: an hour or two")
    parser.add_argument("--limit", type=int, metavar="N", help="N training images for every cell: a short try")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of every cell; else as its config says")
    parser.add_argument("--first-seed", type=int, default=300, metavar="N", help="the first of them")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods; else all there are")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells side by side, one thread each if many")
    parser.add_argument("--collect", action="store_true", help="run nothing, only collect")
    arguments = parser.parse_args()

    cells = load(arguments)
    names = [cell.name for cell in cells]
    if unknown := set(arguments.only or []) - set(names):
        parser.error(f"there is no cell {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    is_try = arguments.small or arguments.limit or arguments.seeds or arguments.methods
    arguments.out.mkdir(parents=True, exist_ok=True)
    own = is_try or arguments.first_seed != 300 or arguments.configs != HERE / "fashion_mnist"
    target = (arguments.out if own else HERE) / "benchmark.json"

    wanted = [cell for cell in cells if not arguments.collect and cell.name in (arguments.only or names)]
    failed = run(wanted, arguments.out, arguments.jobs, lambda: collect(cells, target))
    collect(cells, target)
    print(f"wrote {target}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


def load(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, as the command line changes them."""
    cells = []
    for file in sorted(arguments.configs.glob("*.yaml")):
        limit = arguments.limit or (10_000 if arguments.small else None)
        changes = {
            "seed": arguments.first_seed,
            "data.limit": limit,
            "compare.seeds": arguments.seeds,
            "compare.methods": arguments.methods,
        }
        config = changed(load_config(file), {key: value for key, value in changes.items() if value is not None})
        folder = arguments.out / f"{file.stem}-{config.data.limit or 'all'}"
        cells.append(Cell(file.stem, file, config, folder))
    return cells


def run(cells: list[Cell], out: Path, jobs: int, then: Any) -> list[str]:
    """Run cells side by side, each after the originals it starts from.

    Args:
        cells: The cells.
        out: Where the originals are kept.
        jobs: So many at a time.
        then: Called after each.

    Returns:
        The names of those that failed, in whole or in part.
    """
    # Side by side, a thread each is fastest; alone, as many as torch takes.
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}
    trained: dict[Path, Future[None]] = {}
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[bool], str] = {}
        for cell in cells:
            # Submitted before the cell that waits for them, so each of them has a thread by then.
            for limit, seed in cell.originals().values():
                folder = original_folder(cell, limit, seed, out)
                if folder not in trained:
                    trained[folder] = pool.submit(train, cell, limit, seed, folder, environment)
            running[pool.submit(compare, cell, out, trained, environment)] = cell.name
        try:
            for done in as_completed(running):
                if not done.result():
                    failed.append(running[done])
                then()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def original_folder(cell: Cell, limit: int | None, seed: int, out: Path) -> Path:
    """The run directory of an original: the same for all cells on the same images."""
    data = {key: value for key, value in get(cell.config, "data").items() if key != "limit"}
    key = artifacts.digest([data, get(cell.config, "model"), get(cell.config, "train")])[:8]
    return out / "originals" / f"{key}-{limit or 'all'}-{seed}"


def train(cell: Cell, limit: int | None, seed: int, folder: Path, environment: dict[str, str]) -> None:
    """`megu train`, which does nothing where the original is there."""
    changes = [f"data.limit={limit or 'null'}"]
    call("train", cell, folder, seed, changes, [], environment)


def compare(cell: Cell, out: Path, trained: dict[Path, Future[None]], environment: dict[str, str]) -> bool:
    """`megu compare --tune`; whether all went well."""
    for place, (limit, seed) in cell.originals().items():
        source = original_folder(cell, limit, seed, out)
        trained[source].result()
        place.mkdir(parents=True, exist_ok=True)
        if (source / "original.safetensors").exists():  # otherwise megu trains it in the cell, or says why not
            shutil.copy(source / "original.safetensors", place)
    settings = cell.config.compare
    changes = [f"data.limit={cell.config.data.limit or 'null'}"]
    more = ["--tune", "--seeds", settings.seeds, *(["--methods", ",".join(cell.methods)] if settings.methods else [])]
    return call("compare", cell, cell.folder, cell.config.seed, changes, more, environment)


def call(
    command: str, cell: Cell, folder: Path, seed: int, changes: list[str], more: list[Any], environment: dict[str, str]
) -> bool:
    """A megu command in a process of its own; its log is beside what it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "megu_cli", command, "-c", cell.file, "-o", folder, "--seed", seed, *more]
    words += [word for change in changes for word in ("--set", change)]
    log = folder / "benchmark.log"
    before = log.stat().st_size if log.exists() else 0
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as stream:
        code = subprocess.run([str(word) for word in words], env=environment, stdout=stream, stderr=stream).returncode
    seconds = time.perf_counter() - started
    with log.open(encoding="utf-8") as stream:
        stream.seek(before)
        said = stream.read()
    if ": running" in said or ": tuning with" in said:
        with (folder / "wall.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"command": command, "seconds": round(seconds, 1), "exit": code}) + "\n")
    print(f"{cell.name}: {command} {folder.name} took {seconds:.0f} s" + (f", exit code {code}: {log}" if code else ""))
    return code == 0


def collect(cells: list[Cell], target: Path) -> None:
    """Write the figures of all cells that are there, and what is missing."""
    found, missing = {}, {}
    for cell in cells:
        try:
            body = artifacts.read_body(cell.folder / "compare.json")
        except ArtifactError as error:
            missing[cell.name] = error.message.split(": ")[-1]
            continue
        there = {*body["methods"], *body["failed"]}
        if body["seeds"] != cell.seeds or not there.issuperset(cell.methods) or "tuning" not in body:
            missing[cell.name] = "was run with other seeds or methods"
        else:
            found[cell.name] = figures(cell, body)
    result = {
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in PACKAGES},
        "missing": missing,
        "cells": found,
    }
    results.write(target, result)


def figures(cell: Cell, body: dict[str, Any]) -> dict[str, Any]:
    """What goes into the benchmark of a cell: all of compare.json but for accuracies class by class."""
    methods = {
        name: {
            **row,
            "seeds": {
                seed: {key: value for key, value in own.items() if key not in ("per_class", "settings")}
                for seed, own in row["seeds"].items()
            },
        }
        for name, row in body["methods"].items()
    }
    wall = cell.folder / "wall.jsonl"
    calls = [json.loads(line) for line in wall.read_text(encoding="utf-8").splitlines()] if wall.exists() else []
    return {
        "config": {key: get(cell.config, key) for key in SHOWN},
        "wall_seconds": round(sum(entry["seconds"] for entry in calls), 1),
        **{key: value for key, value in body.items() if key not in ("methods", "meta")},
        "methods": methods,
    }


if __name__ == "__main__":
    main()
