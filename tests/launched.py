"""What tests/test_processes.py starts in one process and in several: the shared computations, their results saved.

Usage: launched.py FILE
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import data_set
from torch import nn

from megu_cli import training
from megu_cli.cli.app import leave
from megu_cli.config import FinetuneConfig, NoiseConfig, TrainConfig
from megu_cli.execution import Execution
from megu_cli.execution.processes import processes
from megu_cli.execution.runtime import seeded
from megu_cli.method.finetune import Forgotten, GroupedNoise, finetune
from megu_cli.method.noise import train_noise
from megu_cli.models.sources import build
from megu_cli.pipeline.resume import Resume


class Normed(nn.Module):
    """Layer norm, and a parameter that the logits do not depend on."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.LayerNorm([8, 4, 4]), nn.GELU(), nn.Flatten(),
            nn.Linear(128, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.body(x))


def main(file: Path) -> None:
    torch.set_num_threads(1)
    shared = processes("cpu")
    digits = data_set("digits", limit=400)
    index = torch.arange(320)

    def trained(model, batch, resume=None, augment="crop+flip", weight_decay=5e-4, accumulate=1):
        recipe = TrainConfig(epochs=2, batch=batch, weight_decay=weight_decay, augment=augment, accumulate=accumulate)
        execution = Execution(processes=shared, resume=resume)
        history = training.train_classifier(model, digits.train, index, recipe, label="train", execution=execution)
        return model, history

    def fresh(dropout=0.0):
        with seeded(0, "init"):
            return Normed(dropout)

    results = {}
    model, history = trained(fresh(), 32)  # 20 steps; equal shards
    assert history.steps == 20
    results["train"] = {name: value.clone() for name, value in model.state_dict().items()}
    results["loss"] = torch.tensor(history.loss)
    results["uneven"] = trained(fresh(), 23)[0].state_dict()  # and a last batch of 21
    results["single"] = trained(fresh(), 319)[0].state_dict()  # a last batch of one image, for two processes
    results["sliced"] = trained(fresh(), 23, accumulate=5)[0].state_dict()  # two processes: batches of 11 and 12
    with seeded(0, "init"):
        results["batch_norm"] = trained(build("small_cnn", 10, 1), 32)[0].state_dict()

    gone = digits.train.labels[index] == 8
    forget, retain = index[gone], index[~gone]
    group = torch.arange(len(retain)) % 2
    execution = Execution(processes=shared)
    results["noise"] = train_noise(
        model, digits.train, retain, group, torch.tensor([3, 8]), NoiseConfig(batch=2, steps=20), away=False, batch=32,
        label="negative", execution=execution,
    )  # fmt: skip
    target = nn.functional.one_hot(torch.full((len(forget),), 3), 10).float()
    prior = torch.full((len(forget), 10), 1 / 9).index_fill(1, torch.tensor([8]), 0).log() * 0.3
    zero = torch.zeros(len(forget), dtype=torch.long)
    results["accuracy"] = torch.tensor(training.accuracy(model, digits.train, index, execution))
    in_slices = copy.deepcopy(model)
    for net, slices in ((model, 1), (in_slices, 3)):
        unlearned = finetune(
            net, digits.train, retain, Forgotten(forget, target, prior, [GroupedNoise(results["noise"], zero)]),
            FinetuneConfig(epochs=2, batch=32, lr=0.01, clean=0.5, accumulate=slices), retain_samples=320,
            forget_batch=16, weight=0.2, validate=lambda net: training.accuracy(net, digits.train, index, execution),
            execution=execution,
        )  # fmt: skip
        assert unlearned.steps == 20
    results["finetune"], results["finetune sliced"] = model.state_dict(), in_slices.state_dict()
    seen = training.predict(model, digits.train, index[:101], classes=10, execution=replace(execution, eval_batch=30))
    results["logits"], results["features"] = seen.logits, seen.features
    results["few"] = training.predict(model, digits.train, index[:1], classes=10, execution=execution).logits

    # With dropout every process has a stream of its own; one checkpoint is left, after 16 of the 20 steps.
    path = file.with_suffix(".checkpoint")
    results["whole"] = trained(fresh(0.5), 32, Resume(path, "key", 0.0))[0].state_dict()
    shared.wait()
    resume = Resume(path, "key", 1e9)
    results["resumed"] = trained(fresh(0.5), 32, resume)[0].state_dict()
    assert resume.seconds > 0
    if shared.first:
        torch.save(results, file)
    shared.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
