"""What unlearning takes on data sets of any size, counted in images that go through the network.

    python benchmarks/cost.py

Writes the table of docs/scaling.md. The counts follow from the default settings and the sizes, by the functions that
size a run; nothing is measured. Hours rest on one assumption, `THROUGHPUT`: with another one all of them change alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from tables import filled, row

from megu_cli.config import Config
from megu_cli.method import proxy
from megu_cli.method.problem import UnlearningProblem
from megu_cli.mllm.chat import CHUNK

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
# Assumed: images a second that a GPU trains on. A pass without gradients takes a third of one with them.
THROUGHPUT, FORWARD = 1000, 1 / 3


@dataclass(frozen=True)
class Case:
    """A data set, a recipe of retraining and a request."""

    name: str
    images: int
    test: int
    classes: int
    epochs: int
    forgotten: int
    kind: str


CASES = (
    Case("CIFAR-10, a class", 50_000, 10_000, 10, 100, 5_000, "classes"),
    Case("CIFAR-10, 500 images", 50_000, 10_000, 10, 100, 500, "samples"),
    Case("ImageNet-1k, a class", 1_281_167, 50_000, 1000, 90, 1_300, "classes"),
    Case("ImageNet-1k, 10,000 images", 1_281_167, 50_000, 1000, 90, 10_000, "samples"),
    Case("100 million images, 10,000 of them", 100_000_000, 1_000_000, 1000, 15, 10_000, "samples"),
)


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), {"cost": table()}), encoding="utf-8")


def counts(case: Case) -> dict[str, float]:
    """Steps of the finetuning; images with and without gradients; the same of retraining and evaluation; MLLM calls."""
    config = Config.model_validate(
        {"data": {"name": "cifar10"}, "model": {"name": "resnet18"}, "forget": {"classes": ["0"]}}
    )
    request = SimpleNamespace(kind=case.kind, forget=range(case.forgotten), retain=range(case.images - case.forgotten))
    problem = UnlearningProblem(
        cast(Any, None), cast(Any, request), config.transition, config.labels, config.noise, config.finetune
    )
    settings, batch = config.finetune, problem.forget_batch
    steps = settings.epochs * math.ceil(problem.retain_samples / settings.batch)
    # Held-out images of a checkpoint of one's own come from the test split: at most half of a class's test images.
    each = min(max(round(config.data.validation * case.images / case.classes), 50), case.test // case.classes // 2)
    held_out, calibrated = each * case.classes, case.kind == "classes"
    return {
        "steps": steps,
        "learned": problem.retain_samples * settings.epochs + steps * batch,
        # The original's answers, the validation after each epoch, the calibration of the classes' outputs.
        "looked_at": (case.forgotten + held_out) * (1 + calibrated) + settings.epochs * held_out,
        "proxy": proxy.passes(config.labels.proxy, config.labels.proxy.images) * config.labels.proxy.images,
        "retraining": case.epochs * (case.images - case.forgotten),
        "evaluation": 3 * (case.images + case.test),
        "calls": config.mllm.images_per_class * math.ceil((case.classes - 1) / CHUNK) if calibrated else 0,
    }


def table() -> str:
    """Markdown of all cases."""
    head = ("", "steps", "images learned on", "images looked at", "retraining: epochs, images", "share of retraining",
            "MLLM calls", "GPU hours: unlearning, retraining, evaluation")  # fmt: skip
    lines = [row(head), row(["---"] * len(head))]
    for case in CASES:
        found = counts(case)
        work = found["learned"] + FORWARD * found["looked_at"]
        hours = [n / THROUGHPUT / 3600 for n in (work, found["retraining"], FORWARD * found["evaluation"])]
        lines.append(
            row(
                [
                    case.name,
                    f"{found['steps']:,}",
                    f"{found['learned']:,}",
                    f"{found['looked_at']:,}",
                    f"{case.epochs}, {found['retraining'] / 1e6:,.1f} million",
                    f"{work / found['retraining']:.2%}",
                    f"{found['calls']:,}" if found["calls"] else "none",
                    ", ".join(f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in hours),
                ]
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
