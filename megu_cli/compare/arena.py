"""Where methods meet for one seed: the same splits, original, oracle and clock; each result is a cell of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli import __version__
from megu_cli.baselines import methods
from megu_cli.compare import tuning
from megu_cli.compare.methods import OURS, Contender
from megu_cli.compare.statistics import Row
from megu_cli.config import changed
from megu_cli.errors import ArtifactError, ConfigError, MeguError
from megu_cli.pipeline import times
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.stages import STAGES, in_group
from megu_cli.run import artifacts, files, ownership, writing
from megu_cli.run.artifacts import Artifact
from megu_cli.run.log import RunLog

if TYPE_CHECKING:
    from torch import nn

    from megu_cli.evaluation.measure import EvaluationProblem, Measurement, Predictions

VERSION = 1
# In a cell's file: scaled confidences of the forget set. compare.json has what follows from them.
CONFIDENCES = "forget_confidences"

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Entry:
    """What one file of results is about.

    Attributes:
        contender: The method and its settings.
        folder: For the method's own files; the results lie beside it.
        context: The run that gives data, request and original.
        rival: The arena whose oracle judges this one's, for ``retrain``.
        score: The model is scored on held-out images, and not judged.
    """

    contender: Contender
    folder: Path
    context: RunContext
    rival: Arena | None = None
    score: bool = False

    @property
    def ours(self) -> bool:
        """True if the method is MeGU, which runs through its own stages."""
        return self.contender.method in OURS

    @property
    def file(self) -> Path:
        """Where the results are."""
        return self.folder.with_name(f"{self.folder.name}.json")


class Arena:
    """Where methods meet for one seed: one original, one oracle.

    Args:
        base: The config's run.
        seed: Of the original, the oracle and the methods; the request is the config's for every seed.
        say: Told what is done.
        apart: Settings are chosen here and nothing is judged, so there is no oracle; request and original are drawn
            for this seed, on as many images as ``compare.tune_limit`` says.

    Raises:
        ConfigError: The original cannot be trained on fewer images.
    """

    def __init__(self, base: RunContext, seed: int, say: Say, apart: bool = False) -> None:
        self.base, self.seed, self.say, self.apart = base, seed, say, apart
        self.name = f"tune-{seed}" if apart else str(seed)
        self.folder = base.directory.out / files.COMPARE_FOLDER / self.name
        if apart:
            self.context = self._smaller()
        elif seed == base.config.seed:
            self.context = base  # shares original and oracle with `megu run`
        else:
            self.context = base.sibling(changed(base.config, {"seed": seed, "out": self.folder}))

    def _smaller(self) -> RunContext:
        config, request = self.base.config, self.base.inputs.request
        limits = [limit for limit in (config.compare.tune_limit, config.data.limit) if limit is not None]
        limit = min(limits, default=None)
        settings: dict[str, Any] = {"seed": self.seed, "out": self.folder, "data.limit": limit}
        if config.compare.tune_limit is not None:
            settings["model.checkpoint"] = None  # it has seen all images
        if limit != config.data.limit and request.section in ("samples", "subjects"):
            # Few of those named are among fewer images: all of what they are all of, or as large a share of the images.
            share = len(request.forget) / (len(request.forget) + len(request.retain))
            named: dict[str, Any] = {
                "classes": {"classes": self._owners},
                "subclasses": {"subclasses": [self.base.inputs.data.concepts[c] for c in request.asked]},
            }.get(request.kind, {"random": {"fraction": share}})
            settings["forget"] = {**named, **self._before}
        context = self.base.sibling(changed(config, settings), request=False, data=limit == config.data.limit)
        if config.compare.tune_limit is not None and context.inputs.user_model.checkpoint:
            given = context.inputs.user_model.checkpoint
            raise ConfigError(
                f"compare.tune_limit: {given} holds weights, and they have seen all images",
                "Leave compare.tune_limit out, or name a directory without weights in model.name.",
            )
        return context

    @property
    def goals(self) -> list[str]:
        """The stages that every method of this seed starts from."""
        goals = ["train"] if self.apart else ["train", "oracle"]
        return goals[1:] if self.context.inputs.user_model.checkpoint else goals

    def refuse_foreign(self, rows: Iterable[Contender], force: bool) -> None:
        """See that the files of these contenders, where they are there, were written by megu.

        Raises:
            ForeignFileError: One was not.
        """
        Pipeline(self.context).refuse_foreign(self.goals)
        for contender in rows:
            entry = self._judged(contender, None)
            file = entry.file.relative_to(self.base.directory.out)
            ownership.refuse_foreign(self.base.directory.out, file.as_posix())
            if entry.ours and entry.folder.exists():
                ours = self._ours(entry)
                ours.refuse_foreign(ours.all_before(["finetune"]), force)

    def prepare(self, goals: Sequence[str] | None = None) -> None:
        """Train the original and, where anything is judged, the oracle, unless they are there.

        Args:
            goals: Only these of `goals`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        pipeline = Pipeline(self.context, lambda line: self.say(f"{self.name}/{line}"))
        pipeline.run(goals=self.goals if goals is None else goals)

    # -- loaded when the first cell needs them ---------------------------------------------------------------------

    @cached_property
    def _oracle(self) -> Artifact:
        return artifacts.read(self.context.directory.out / STAGES["oracle"].file)

    def oracle_model(self) -> nn.Module:
        """The oracle, in eval mode."""
        return self.context.load(self._oracle.tensors, STAGES["oracle"].file)

    @cached_property
    def evaluation_problem(self) -> EvaluationProblem:
        """The forget request and the settings that models are measured with."""
        from megu_cli.pipeline.steps.problem import evaluation_problem

        return evaluation_problem(self.context)

    @cached_property
    def original_predictions(self) -> Predictions:
        """The original's predictions."""
        from megu_cli.evaluation.measure import Predictions

        return Predictions.of(self.context.original(), self.evaluation_problem, "original")

    @cached_property
    def oracle(self) -> Measurement:
        """The oracle under evaluation."""
        return self._measurement(self.oracle_model(), "oracle")

    def _measurement(self, model: nn.Module, name: str) -> Measurement:
        from megu_cli.evaluation.measure import Measurement, Predictions

        problem = self.evaluation_problem
        return Measurement(problem, Predictions.of(model, problem, name), self.original_predictions, model)

    def forget_loaded(self) -> None:
        """Free what only cells that are yet to be computed need."""
        for name in ("_oracle", "oracle", "original_predictions", "evaluation_problem"):
            self.__dict__.pop(name, None)

    # -- cells -----------------------------------------------------------------------------------------------------

    def plan(self, contender: Contender, rival: Arena | None) -> tuple[str, str]:
        """Whether a cell would be kept or run, and why."""
        if contender.method == "retrain" and rival and (missing := rival._unprepared()):
            return "run", f"seed {rival.seed}: {missing}"
        action, reason, _ = self._planned(self._judged(contender, rival))
        return action, reason

    def plan_trial(self, name: str, number: int, given: Mapping[str, Any]) -> tuple[str, str, float | None]:
        """Whether the score of a point of a grid would be kept or computed, why, and the score that would be kept."""
        action, reason, found = self._planned(self._trial(name, number, given))
        return action, reason, found.body["score"] if found else None

    def _planned(self, entry: _Entry) -> tuple[str, str, Artifact | None]:
        if missing := self._unprepared():
            return "run", missing, None
        if entry.ours:
            if not entry.folder.exists():
                return "run", "missing", None
            if (state := self._ours(entry).state("finetune")).status != "fresh":
                return "run", f"finetune is {state.status}", None
        found = _fresh(entry.file, self._parts(entry))
        return ("keep", "fresh", found) if found else ("run", "missing or changed", None)

    def _unprepared(self) -> str:
        """Which of original and oracle is not there; empty if none."""
        pipeline = Pipeline(self.context)
        states = {goal: pipeline.state(goal).status for goal in self.goals}
        found = [(goal, status) for goal, status in states.items() if status != "fresh"]
        return f"the {'original' if found[0][0] == 'train' else 'oracle'} is {found[0][1]}" if found else ""

    def cell(self, contender: Contender, rival: Arena | None, force: bool = False) -> Artifact:
        """The figures of one method; computed unless the file fits.

        Args:
            contender: The method and its settings.
            rival: The arena whose oracle judges this one's, for ``retrain``.
            force: Compute it anyway.

        Raises:
            Exception: Whatever the method raises.
        """
        return self._result(self._judged(contender, rival), force)

    def trial(self, name: str, number: int, given: Mapping[str, Any], force: bool = False) -> Artifact:
        """The score of one point of a method's grid, from training and validation images alone.

        The score is the accuracy on retained validation images less |accuracy on D_f - target|: target 0 for images of
        wholly forgotten classes, and for others the accuracy on held-out images of their classes (of all that stay,
        where none of theirs is held out). A sub-class request is tuned on forgetting the classes that own the
        sub-classes.
        """
        return self._result(self._trial(name, number, given), force)

    def _judged(self, contender: Contender, rival: Arena | None) -> _Entry:
        return _Entry(contender, self.folder / contender.label, self.context, rival)

    def _trial(self, name: str, number: int, given: Mapping[str, Any]) -> _Entry:
        folder = self.folder / "tune" / f"{name}-{number}"
        return _Entry(Contender(name, name, given), folder, self._tuning, score=True)

    def _result(self, entry: _Entry, force: bool) -> Artifact:
        """What the file of an entry holds; it is computed and written unless it is there and fits."""
        contender, key = entry.contender, f"{self.name}/{entry.folder.relative_to(self.folder).as_posix()}"
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        if entry.ours:
            if not force:
                self._borrow(entry)
            self._ours(entry).run(force, goals=["finetune"])
        parts = self._parts(entry)
        if not force and (found := _fresh(entry.file, parts)):
            if not entry.score:
                self.say(f"{key}: fresh")
            return found
        self.say(f"{key}: {f'tuning with {tuning.described(contender.settings)}' if entry.score else 'running'}")
        model, seconds, machine = self._made(entry)
        self._log(parts, seconds, machine)
        if entry.score:
            body = {"score": tuning.score(model, entry.context), "settings": dict(contender.settings)}
        else:
            body = self._judge(model, entry) | {"settings": parts["settings"]["method"]}
        return keep(entry.file, body, parts, self.seed)

    @cached_property
    def _tuning(self) -> RunContext:
        config = self.context.config
        if self.context.inputs.request.kind != "subclasses":
            return self.context
        settings = {
            "seed": self.seed,
            "forget": {"classes": self._owners, **self._before},
            "out": self.folder / "tune",
            "model.checkpoint": self.context.inputs.original.path,
        }
        return self.context.sibling(changed(config, settings), request=False)

    @property
    def _before(self) -> dict[str, Any]:
        """What the config says of earlier requests."""
        return self.base.config.forget.model_dump(include={"already", "already_missing"})

    @property
    def _owners(self) -> list[str]:
        """The classes of what is asked for."""
        data, request = self.base.inputs.data, self.base.inputs.request
        return sorted({data.classes[int(data.concept_class[c])] for c in request.asked})

    def _made(self, entry: _Entry) -> tuple[nn.Module, float | None, str]:
        """The model that a method makes, the seconds it took, and where."""
        from megu_cli.execution.runtime import machine

        name = entry.contender.method
        if name == "retrain":
            known = times.seconds(self.context.directory.out, self.context.directory.log, "oracle")
            return self.oracle_model(), *(known or (None, ""))
        if entry.ours:
            ours = self._ours(entry).context
            return ours.unlearned(), *(times.method_seconds(ours.directory.out, ours.directory.log) or (None, ""))
        from megu_cli.pipeline.steps.problem import task

        method = methods()[name]
        function, settings = method.load(), method.settings(entry.contender.settings)
        model, problem = entry.context.original(), task(entry.context)
        started = time.perf_counter()
        function(model, problem, **settings)
        seconds = time.perf_counter() - started
        broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise MeguError(f"{name} left NaN or infinite weights in {', '.join(broken[:3])}")
        return model.eval(), seconds, machine()

    def _ours(self, entry: _Entry) -> Pipeline:
        """MeGU's pipeline from this arena's original, in a folder of its own."""
        contender, original = entry.contender, self.context.inputs.original.path
        settings = {**OURS[contender.method], **contender.settings, "out": entry.folder, "model.checkpoint": original}
        config = changed(entry.context.config, {"seed": self.seed, **settings})
        entry.folder.mkdir(parents=True, exist_ok=True)
        return Pipeline(entry.context.sibling(config))

    def _borrow(self, entry: _Entry) -> None:
        """Copy what others have made and MeGU's run directory has not; what does not fit is stale and is rebuilt.

        A variant takes it from its method's run directory, and the method takes the ratings that all seeds share.
        """
        ours = self._ours(entry)
        before = ours.all_before(["finetune"])[:-1]
        if entry.contender.label != entry.contender.method:
            source = self.folder / entry.contender.method
        elif entry.context is self.context and not self.apart:
            source, before = self.base.directory.out, [name for name in before if name in in_group("ratings")]
        else:  # other images or another request, which are rated anew
            return
        if ours.state("finetune").status == "fresh":
            return
        directory, log = ours.context.directory, RunLog(source)
        for name in before:
            # Anew for each stage: what was copied decides whether the next one fits.
            state, stage = Pipeline(ours.context).state(name), STAGES[name]
            if state.status not in ("missing", "stale") or not (source / stage.file).is_file():
                continue
            with writing.replacing(directory.out / stage.file) as temporary:
                shutil.copyfile(source / stage.file, temporary)
            meta = artifacts.read_meta(directory.out / stage.file)
            if (made := log.last(meta["fingerprint"])) and not directory.log.last(meta["fingerprint"]):
                directory.log.append(made)

    def _judge(self, model: nn.Module, entry: _Entry) -> Row:
        """All figures of a model; the oracle itself is judged by the oracle of the next seed."""
        from megu_cli.evaluation.measure import per_class
        from megu_cli.evaluation.ulira import scaled

        retrained = entry.contender.method == "retrain"
        measurement = self.oracle if retrained else self._measurement(model, entry.contender.method)
        judge = entry.rival if retrained else self
        return {
            "metrics": measurement.figures,
            "comparison": measurement.beside(judge.oracle) if judge else {},
            "entanglement": measurement.entanglement,
            "per_class": per_class(measurement.predictions, self.context.inputs.data),
            # Of each forgotten image, for the attacks that need several seeds.
            CONFIDENCES: scaled(measurement.predictions.train.loss[self.context.inputs.request.forget].numpy())
            .round(4)
            .tolist(),
        }

    def _parts(self, entry: _Entry) -> dict[str, Any]:
        """The key of a cell or of a score."""
        from megu_cli.pipeline.steps.problem import task

        name, context, rival = entry.contender.method, entry.context, entry.rival
        version, own = "1", dict(entry.contender.settings)
        judging = STAGES["eval"]
        known = context.inputs.settings(("model.name",) if entry.score else judging.settings)
        settings = {"seed": self.seed, **known}
        inputs = {key: context.inputs.digest(key) for key in ("train_data", "test_data", "forget")}
        inputs["checkpoint"] = self.context.inputs.digest("checkpoint")
        if name == "retrain":
            own = context.config.train.keyed()
            inputs["rival"] = rival._oracle_content if rival else ""
        elif entry.ours:
            # The content of a file that is named shows in what was made from it; where it lies does not matter.
            own = {key: v.name if isinstance(v, Path) else v for key, v in {**OURS[name], **own}.items()}
            inputs["finetune"] = str(artifacts.read_meta(entry.folder / STAGES["finetune"].file)["content"])
        else:
            method = methods()[name]
            own, version = method.settings(own), method.version
            shared = task(context)
            settings |= {"samples": shared.samples, "batch": shared.batch, "forget_batch": shared.forget_batch}
        if not entry.score:
            inputs["oracle"] = self._oracle_content
        return {
            "stage": f"{'tune' if entry.score else 'compare'} {name}",
            "version": [VERSION, judging.version, version],
            "settings": {**settings, "method": own},
            "inputs": inputs,
        }

    @property
    def _oracle_content(self) -> str:
        return Pipeline(self.context).state("oracle").content

    # -- the clock -------------------------------------------------------------------------------------------------

    def _log(self, parts: Mapping[str, Any], seconds: float | None, machine: str) -> None:
        if seconds is not None:
            entry = {"stage": parts["stage"], "fingerprint": artifacts.digest(parts), "seconds": round(seconds, 6)}
            self.base.directory.log.append({**entry, "machine": machine})

    def clock(self, cell: Artifact) -> Row:
        """Seconds of a cell, and as a share of retraining where both were measured on one machine."""
        own = self.base.directory.log.seconds(cell.meta["fingerprint"])
        oracle = times.seconds(self.context.directory.out, self.context.directory.log, "oracle")
        same = own and oracle and own[1] == oracle[1] and oracle[0]
        return {
            "seconds": own[0] if own else None,
            "time_ratio": own[0] / oracle[0] if own and oracle and same else None,
        }


def keep(path: Path, body: Row, parts: Mapping[str, Any], seed: int) -> Artifact:
    """Write a result with its key, and return it."""
    meta = {**parts, "fingerprint": artifacts.digest(parts), "seed": seed, "megu": __version__}
    sealed = artifacts.seal(Artifact(body), meta)
    artifacts.write(path, sealed)
    return sealed


def _fresh(path: Path, parts: Mapping[str, Any]) -> Artifact | None:
    """The artifact at ``path``, if it is whole and has this key."""
    try:
        found = artifacts.read(path)
    except ArtifactError:
        return None
    return found if found.meta.get("fingerprint") == artifacts.digest(parts) else None
