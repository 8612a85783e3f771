"""What a run will take: each stage's own code on a few batches, timed. Nothing is made, and no image is sent."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megu_cli import training
from megu_cli.errors import MeguError
from megu_cli.evaluation import membership, probe
from megu_cli.execution import Execution
from megu_cli.execution.runtime import generator
from megu_cli.method import proxy
from megu_cli.method import unlearn as unlearning
from megu_cli.method.unlearn import Labels, UnlearningProblem
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.stages import in_group
from megu_cli.pipeline.steps.problem import fresh, problem
from megu_cli.run import files

# What is timed: a first step that warms up, then so many, or as many as there is patience for.
_STEPS = 5
_PATIENCE = 2.0
# Of an attack and a probe, whose time is then scaled up.
_SAMPLED = 300
# eval.json: some tables, and what the report draws.
_EVAL_BYTES = 100_000
# Images to forget that are named.
_NAMED = 5


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


class _Stopwatch:
    """A `runtime.Track` that notes when each unit of work ends, and calls a halt."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ends: list[float] = []

    @contextlib.contextmanager
    def __call__(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        self._started = time.perf_counter()

        def advance() -> None:
            self._ends.append(time.perf_counter())
            if len(self._ends) > _STEPS or (len(self._ends) > 1 and self._ends[-1] - self._started > _PATIENCE):
                raise _Enough

        yield advance

    @property
    def seconds(self) -> float:
        """Seconds of a unit: the median, without the first where there are more."""
        ends = [self._started, *self._ends]
        spans = [after - before for before, after in itertools.pairwise(ends)]
        return statistics.median(spans[1:] or spans or [0.0])


def _timed(work: Callable[[_Stopwatch], object]) -> float:
    watch = _Stopwatch()
    with contextlib.suppress(_Enough):
        work(watch)
    return watch.seconds


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _few(index: torch.Tensor, number: int) -> torch.Tensor:
    """Some of the positions, drawn: a folder's come class by class."""
    return index[torch.randperm(len(index), generator=generator(0, "plan"))[:number]].sort().values


def estimates(work: RunContext) -> dict[str, Estimate]:
    """Stage -> what it takes; ``oracle`` is there whether or not the config asks for it.

    Raises:
        MeguError: Data, request or model are at fault.
    """
    rehearsal = _Rehearsal(work)
    made = {
        "train": rehearsal.training(int(work.inputs.data.trainable.sum()), validated=0),
        "oracle": rehearsal.training(len(work.inputs.request.retain), validated=len(work.inputs.request.validation)),
        "similarity": rehearsal.similarity(),
        "transition": Estimate(disk_bytes=8 * len(work.inputs.request.asked) * len(work.inputs.data.classes)),
        "labels": rehearsal.labels(),
        "noise": rehearsal.noise(),
        "finetune": rehearsal.finetune(),
        "eval": rehearsal.evaluation(),
    }
    if work.inputs.user_model.checkpoint:
        del made["train"]
    return made


def described(rows: list[dict[str, Any]], made: Mapping[str, Estimate]) -> dict[str, Any]:
    """The plan with its estimates, their sum over what would run, and the same for retraining.

    Args:
        rows: Stage, action and reason of each stage.
        made: From `estimates`.
    """
    plan = [{**row, **asdict(made[row["stage"]])} for row in rows]
    runs = [made[row["stage"]] for row in rows if row["action"] == "run"]
    known = [estimate.seconds for estimate in runs if estimate.seconds is not None]
    own = sum(made[name].seconds or 0.0 for name in in_group("method"))
    retraining = made["oracle"]
    return {
        "plan": plan,
        "total": {
            "calls": sum(estimate.calls for estimate in runs),
            "seconds": sum(known),
            "untimed": [row["stage"] for row in plan if row["action"] == "run" and row["seconds"] is None],
            "memory_bytes": max((estimate.memory_bytes or 0 for estimate in runs), default=0),
            "disk_bytes": sum(estimate.disk_bytes for estimate in runs),
        },
        "retraining": asdict(retraining),
        "time_ratio": own / retraining.seconds if retraining.seconds else None,
    }


class _Rehearsal:
    """Each stage in small, on a model of random weights: time and memory do not depend on them."""

    def __init__(self, work: RunContext) -> None:
        work.runtime.start()
        self.work = work
        self.problem: UnlearningProblem = problem(work)
        self.device = work.runtime.device
        self._some = _few(torch.arange(len(work.inputs.data.train)), 2 * _SAMPLED)
        self._per_sample, self._outputs, self._reading = self._prediction()
        state = self._model().state_dict().values()
        self.model_bytes = sum(value.numel() * value.element_size() for value in state)

    def _model(self) -> nn.Module:
        return fresh(self.work, "plan")

    def _prediction(self) -> tuple[float, training.Outputs, int | None]:
        """Seconds per image of a prediction, some outputs, and the memory it takes."""
        split, model, classes = self.work.inputs.data.train, self._model().eval(), len(self.work.inputs.data.classes)
        size = min(self.work.inputs.eval_batch, len(split))
        index = torch.arange(size).repeat(1 + _STEPS)

        def few(watch: _Stopwatch) -> None:
            execution = Execution(self.device, eval_batch=size, track=watch)
            training.predict(model, split, index, classes=classes, execution=execution)

        with _peak(self.device) as memory:
            per_sample = _timed(few) / size
        execution = Execution(self.device, eval_batch=32)
        outputs = training.predict(model, split, self._some, classes=classes, execution=execution)
        return per_sample, outputs, memory()

    def training(self, samples: int, validated: int) -> Estimate:
        """`megu train`, or the oracle."""
        settings, model, split = self.work.config.train, self._model(), self.work.inputs.data.train
        brief = settings.model_copy(update={"epochs": 1, "lr": 1e-6, "weight_decay": 0.0})
        index = torch.arange(len(split)).repeat(1 + _STEPS * settings.batch // len(split))

        def few(watch: _Stopwatch) -> None:
            some, execution = index[: (1 + _STEPS) * settings.batch], Execution(self.device, track=watch)
            training.train_classifier(model, split, some, brief, label="plan", execution=execution)

        with _peak(self.device) as memory:
            step = _timed(few)
        steps = settings.epochs * math.ceil(samples / settings.batch)
        seconds = steps * step + settings.epochs * validated * self._per_sample
        return Estimate(steps, 0, seconds, memory(), self.model_bytes)

    def similarity(self) -> Estimate:
        """The ratings: calls only; to time one would mean to make it."""
        if self.work.config.mllm.backend in ("none", "recorded"):
            return Estimate(disk_bytes=self._rated_bytes)
        cost = self.work.inputs.rating_cost()
        return Estimate(0, cost.calls, None if cost.calls else 0.0, None, self._rated_bytes)

    @property
    def _rated_bytes(self) -> int:
        return sum(len(candidate) + 10 for question in self.work.inputs.questions for candidate in question.candidates)

    def labels(self) -> Estimate:
        """Predictions on D_f and, where labels look at them, on held-out images; and the proxy."""
        given, request = self.problem, self.work.inputs.request
        number, classes = len(request.forget), len(self.work.inputs.data.classes)
        soft = 4 * classes if given.label_mode != "hard" else 0
        looks = given.label_mode == "proxy" or (given.label_mode != "hard" and given.labels.keep == "auto")
        images = number + (len(self.work.inputs.data.held_out) if looks else 0)
        seconds, steps = images * self._per_sample, 0
        if given.label_mode == "proxy":
            steps, asking = self._proxy()
            seconds += asking
        return Estimate(steps, 0, seconds, self._reading, number * (16 + soft))

    def _proxy(self) -> tuple[int, float]:
        """Steps and seconds of the proxy."""
        settings, request = self.problem.labels.proxy, self.work.inputs.request
        some = _few(request.retain, _SAMPLED)
        small = settings.model_copy(update={"networks": 1, "passes": 1})
        split, classes = self.work.inputs.data.train, len(self.work.inputs.data.classes)
        # One pass over some images, and their answers.
        seconds = _seconds(lambda: proxy.answers(split, some, split.view(some[:1]), classes, small)) / len(some)
        known = min(settings.images, len(request.retain))
        samples = proxy.passes(settings, known) * known * settings.networks
        return proxy.steps(settings, known), seconds * (samples + len(request.forget))

    def noise(self) -> Estimate:
        """The noise pair."""
        given = self.problem
        use = given.noise_use(given.label_mode)
        kinds = {"both": 2, "none": 0}.get(use, 1)
        if not kinds:
            return Estimate()
        small = replace(given, noise=given.noise.model_copy(update={"steps": 1 + _STEPS}))
        model, labels = self._model(), self._labels()
        with _peak(self.device) as memory:
            step = _timed(lambda watch: unlearning.noise_pair(_watched(small, watch), model, labels))
        image = self.work.inputs.data.train.images[0].shape[1:].numel() * self.work.inputs.data.channels
        groups = given.true.unique().numel()
        if use in ("both", "positive"):
            groups += min(len(self.work.inputs.data.classes) - 1, len(given.true))
        steps = kinds * given.noise.steps
        return Estimate(steps, 0, steps * step, memory(), 4 * groups * given.noise.batch * image)

    def finetune(self) -> Estimate:
        """Fragment-Align."""
        given = self.problem
        settings = given.finetune
        whole = settings.epochs * math.ceil(given.retain_samples / settings.batch)
        steps = min(whole, settings.max_steps or whole)
        few = replace(
            given,
            finetune=settings.model_copy(update={"max_steps": 1 + _STEPS, "lr": 1e-6}),
            request=replace(given.request, validation=given.request.validation[:0]),
        )
        matrix, labels, pair = self._matrix(), self._labels(), self._pair()
        model = self._model()
        with _peak(self.device) as memory:
            step = _timed(lambda watch: unlearning.align(_watched(few, watch), model, matrix, labels, pair))
        epochs = math.ceil(steps * settings.epochs / whole)
        seconds = steps * step + epochs * len(self.work.inputs.request.validation) * self._per_sample
        return Estimate(steps, 0, seconds, memory(), self.model_bytes)

    def evaluation(self) -> Estimate:
        """Predictions and metrics of two models, or three with an oracle, and of the mask."""
        work, settings = self.work, self.work.config.eval
        oracle = settings.oracle or (work.directory.out / files.ORACLE).exists()
        models = 3 if oracle else 2
        images = len(work.inputs.data.train) + len(work.inputs.data.test)
        seconds = (models * images + len(work.inputs.request.forget)) * self._per_sample + (
            models + 1
        ) * self._metrics()
        if settings.relearn_epochs:
            batches = math.ceil(len(work.inputs.request.forget) / 64)
            per_step = 3 * 64 * self._per_sample  # forward, and backward at about twice that
            seconds += models * settings.relearn_epochs * batches * per_step
        # `measure.SplitPredictions`: four figures of every image, logits of D_f, features of a sample of each kind.
        sampled = 4 * min(settings.probe_samples, len(work.inputs.data.train))
        numbers = (
            len(work.inputs.request.forget) * self._outputs.logits.shape[1] + sampled * self._outputs.features.shape[1]
        )
        kept = (models + 1) * (20 * images + 4 * numbers)
        return Estimate(0, 0, seconds, None if self._reading is None else self._reading + kept, _EVAL_BYTES)

    def _metrics(self) -> float:
        """Seconds of the two slow metrics of one model: timed on a few samples, and scaled to all of them."""
        settings, data = self.work.config.eval, self.work.inputs.data
        y = data.train.labels[self._some]
        sure = self._outputs.logits.softmax(1).gather(1, y[:, None])[:, 0]
        half = len(sure) // 2
        features = self._outputs.features
        attack = _seconds(lambda: membership.mia_confidence_svc(sure[:half], sure[half : 2 * half], sure))
        probing = _seconds(lambda: probe.probe_acc(features, y, features, y)) if len(y.unique()) > 1 else 0.0
        attacked = min(settings.attack_samples, len(self.work.inputs.request.retain), len(data.test))
        probed = min(settings.probe_samples, len(data.train))
        # A support vector machine is quadratic in its samples, a regression linear.
        return attack * (attacked / max(half, 1)) ** 2 + probing * probed / len(y)

    # -- stand-ins for what earlier stages make --------------------------------------------------------------------

    def _matrix(self) -> torch.Tensor:
        candidates = {question.concept: question.candidates for question in self.work.inputs.questions}
        level = {concept: dict.fromkeys(compared, 0.0) for concept, compared in candidates.items()}
        return unlearning.transition(self.problem, candidates, level)

    def _labels(self) -> Labels:
        given, classes = self.problem, len(self.work.inputs.data.classes)
        labels = (given.true + 1) % classes
        target = None if given.label_mode == "hard" else functional.one_hot(labels, classes).float()
        return Labels(given.label_mode, labels, target)

    def _pair(self) -> dict[str, torch.Tensor]:
        given, labels = self.problem, self._labels().perturbing
        first = next(self.work.inputs.data.train.batches([self.work.inputs.request.retain[:1]]))
        use = given.noise_use(given.label_mode)
        values = {"positive": labels, "negative": given.true}
        pair: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            if use in ("both", name):
                pair[f"{name}_class"] = value.unique()
                pair[name] = torch.zeros(len(pair[f"{name}_class"]), given.noise.batch, *first.shape[1:])
        return pair


def _watched(problem: UnlearningProblem, watch: _Stopwatch) -> UnlearningProblem:
    return replace(problem, execution=replace(problem.execution, track=watch))


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Gives a function that tells the peak memory in bytes since the block began."""
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


def planned(
    work: RunContext, rows: list[dict[str, Any]], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """`described` of a plan, with what is to be forgotten; nothing is timed where nothing would run.

    Raises:
        MeguError: The data or the request are at fault.
    """
    names, request = work.inputs.data.train.names, work.inputs.request
    first = [names[position] for position in request.forget[:_NAMED].tolist()]
    asked = {"notes": work.inputs.notes, "forget": {"images": len(request.forget), "first": first}}
    if all(row["action"] == "keep" for row in rows):
        total = {"calls": 0, "seconds": 0.0, "untimed": [], "memory_bytes": 0, "disk_bytes": 0}
        return {"plan": rows, "total": total, "note": "Everything is fresh: nothing would run.", **asked}
    say("timing a few batches of each stage; nothing is made")
    try:
        return {**described(rows, estimates(work)), **asked}
    except MeguError as error:
        return {"plan": rows, "note": f"no estimates: {error.message.splitlines()[0]}", **asked}
