"""Each stage in small, timed: the means with which the stages in `megu_cli.pipeline.steps` estimate what they take."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from megu_cli import training
from megu_cli.execution import Execution
from megu_cli.execution.runtime import generator
from megu_cli.method.unlearn import UnlearningProblem
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import fresh, problem

# Steps that are timed after a first one that warms up; fewer where they take longer than the seconds below.
STEPS = 5
_PATIENCE = 2.0
# Samples on which slow metrics and the proxy are timed; the time is then scaled up.
SAMPLED = 300


@dataclass(frozen=True)
class Estimate:
    """What a stage takes, about.

    Attributes:
        steps: Optimiser steps.
        calls: Calls of a multimodal LLM.
        seconds: On this machine, as busy as it is now; ``None`` where it cannot be told without a call.
        memory_bytes: Peak of the process, or of the GPU where there is one.
        disk_bytes: Of the files that stay.
    """

    steps: int = 0
    calls: int = 0
    seconds: float | None = 0.0
    memory_bytes: int | None = None
    disk_bytes: int = 0


class _Enough(Exception):  # noqa: N818 - it says that a rehearsal is over, not that anything is wrong
    """Ends a rehearsal."""


class Stopwatch:
    """A `runtime.Track` that notes when each unit of work ends, and calls a halt."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ends: list[float] = []

    @contextlib.contextmanager
    def __call__(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """See `runtime.Track`."""
        self._started = time.perf_counter()

        def advance() -> None:
            self._ends.append(time.perf_counter())
            if len(self._ends) > STEPS or (len(self._ends) > 1 and self._ends[-1] - self._started > _PATIENCE):
                raise _Enough

        yield advance

    @property
    def seconds(self) -> float:
        """Seconds of a unit: the median, without the first where there are more."""
        ends = [self._started, *self._ends]
        spans = [after - before for before, after in itertools.pairwise(ends)]
        return statistics.median(spans[1:] or spans or [0.0])


def timed(computation: Callable[[Stopwatch], object]) -> float:
    """Seconds of one unit of a computation that reports its progress to a stopwatch."""
    watch = Stopwatch()
    with contextlib.suppress(_Enough):
        computation(watch)
    return watch.seconds


def seconds(computation: Callable[[], object]) -> float:
    """Seconds of a whole computation."""
    begun = time.perf_counter()
    computation()
    return time.perf_counter() - begun


def few(index: torch.Tensor, number: int) -> torch.Tensor:
    """Some of the positions, drawn: a folder's come class by class."""
    return index[torch.randperm(len(index), generator=generator(0, "plan"))[:number]].sort().values


def watched(problem: UnlearningProblem, watch: Stopwatch) -> UnlearningProblem:
    """The problem, with progress reported to a stopwatch."""
    return replace(problem, execution=replace(problem.execution, track=watch))


class Rehearsal:
    """What the estimates of all stages share: a model of random weights, since time and memory do not depend on them.

    Attributes:
        context: The run.
        problem: The forget request and the method's settings.
        some: Positions of some training images, drawn.
        outputs: Predictions of the model on these.
        per_sample: Seconds that a prediction takes per image.
        predicting_bytes: Peak memory of predictions; ``None``: not known.
        model_bytes: Size of the model's weights.
    """

    def __init__(self, context: RunContext) -> None:
        context.runtime.start()
        self.context = context
        self.problem: UnlearningProblem = problem(context)
        self.some = few(torch.arange(len(context.inputs.data.train)), 2 * SAMPLED)
        self.per_sample, self.outputs, self.predicting_bytes = self._prediction()
        state = self.model().state_dict().values()
        self.model_bytes = sum(value.numel() * value.element_size() for value in state)

    def model(self) -> nn.Module:
        """Return a model of random weights."""
        return fresh(self.context, "plan")

    def _prediction(self) -> tuple[float, training.Outputs, int | None]:
        """Seconds per image of a prediction, some outputs, and the memory it takes."""
        inputs, device, model = self.context.inputs, self.context.runtime.device, self.model().eval()
        split, classes = inputs.data.train, len(inputs.data.classes)
        size = min(inputs.eval_batch, len(split))
        index = torch.arange(size).repeat(1 + STEPS)

        def some_batches(watch: Stopwatch) -> None:
            execution = Execution(device, eval_batch=size, track=watch)
            training.predict(model, split, index, classes=classes, execution=execution)

        with self.peak() as memory:
            per_sample = timed(some_batches) / size
        execution = Execution(device, eval_batch=32)
        outputs = training.predict(model, split, self.some, classes=classes, execution=execution)
        return per_sample, outputs, memory()

    @contextlib.contextmanager
    def peak(self) -> Iterator[Callable[[], int | None]]:
        """Gives a function that tells the peak memory in bytes since the block began."""
        device = self.context.runtime.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            yield lambda: int(torch.cuda.max_memory_allocated(device))
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten
        yield _resident


def _resident() -> int | None:
    """Peak resident memory of this process in bytes; ``None`` where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
