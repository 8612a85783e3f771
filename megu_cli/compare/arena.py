"""Where methods meet for one seed: the same splits, original, oracle and clock; each result is a cell of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli import __version__
from megu_cli.baselines import methods
from megu_cli.compare import tuning
from megu_cli.compare.methods import OURS, Variant
from megu_cli.compare.statistics import Row
from megu_cli.config import changed
from megu_cli.errors import ArtifactError, ConfigError, MeguError
from megu_cli.pipeline import times
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.stages import STAGES
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
        self.folder = base.directory.out / files.COMPARE_FOLDER / (f"tune-{seed}" if apart else str(seed))
        if apart:
            self.work = self._smaller()
        elif seed == base.config.seed:
            self.work = base  # shares original and oracle with `megu run`
        else:
            self.work = base.sibling(changed(base.config, {"seed": seed, "out": self.folder}))

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
        work = self.base.sibling(changed(config, settings), request=False, data=limit == config.data.limit)
        if config.compare.tune_limit is not None and work.inputs.user_model.checkpoint:
            raise ConfigError(
                f"compare.tune_limit: {work.inputs.user_model.checkpoint} holds weights, and they have seen all images",
                "Leave compare.tune_limit out, or name a directory without weights in model.name.",
            )
        return work

    @property
    def _goals(self) -> list[str]:
        goals = ["train"] if self.apart else ["train", "oracle"]
        return goals[1:] if self.work.inputs.user_model.checkpoint else goals

    def refuse_foreign(self, rows: Mapping[str, Variant], force: bool) -> None:
        """See that the files of these rows, where they are there, were written by megu.

        Raises:
            ForeignFileError: One was not.
        """
        Pipeline(self.work).refuse_foreign(self._goals)
        for name, row in rows.items():
            folder = self.folder / name
            file = _file(folder).relative_to(self.base.directory.out)
            ownership.refuse_foreign(self.base.directory.out, file.as_posix())
            if row.method in OURS and folder.exists():
                ours = self._ours(row.method, row.changes, folder, self.work)
                ours.refuse_foreign(ours.all_before(["finetune"]), force)

    def prepare(self) -> None:
        """Train the original and, where anything is judged, the oracle, unless they are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        Pipeline(self.work, lambda line: self.say(f"{self.seed}/{line}")).run(goals=self._goals)

    # -- loaded when the first cell needs them ---------------------------------------------------------------------

    @cached_property
    def _oracle(self) -> Artifact:
        return artifacts.read(self.work.directory.out / STAGES["oracle"].file)

    def oracle_model(self) -> nn.Module:
        """The oracle, in eval mode."""
        return self.work.load(self._oracle.tensors, STAGES["oracle"].file)

    @cached_property
    def evaluation_problem(self) -> EvaluationProblem:
        """The forget request and the settings that models are measured with."""
        from megu_cli.pipeline.steps.problem import evaluation_problem

        return evaluation_problem(self.work)

    @cached_property
    def original_predictions(self) -> Predictions:
        """The original's predictions."""
        from megu_cli.evaluation.measure import Predictions

        return Predictions.of(self.work.original(), self.evaluation_problem, "original")

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

    def plan(
        self, name: str, given: Mapping[str, Any], rival: Arena | None, label: str | None = None
    ) -> tuple[str, str]:
        """Whether a cell would be kept or run, and why."""
        if name == "retrain" and rival and (missing := rival._unprepared()):
            return "run", f"seed {rival.seed}: {missing}"
        action, reason, _ = self._planned(name, given, self.folder / (label or name), self.work, rival)
        return action, reason

    def plan_trial(self, name: str, number: int, given: Mapping[str, Any]) -> tuple[str, str, float | None]:
        """Whether the score of a point of a grid would be kept or computed, why, and the score that would be kept."""
        action, reason, kept = self._planned(name, given, self._trial(name, number), self._tuning, score=True)
        return action, reason, kept.body["score"] if kept else None

    def _planned(
        self,
        name: str,
        given: Mapping[str, Any],
        folder: Path,
        work: RunContext,
        rival: Arena | None = None,
        score: bool = False,
    ) -> tuple[str, str, Artifact | None]:
        if missing := self._unprepared():
            return "run", missing, None
        if name in OURS and not folder.exists():
            return "run", "missing", None
        if name in OURS and (state := self._ours(name, given, folder, work).state("finetune")).status != "fresh":
            return "run", f"finetune is {state.status}", None
        kept = _fresh(_file(folder), self._parts(name, given, folder, work, rival, score))
        return ("keep", "fresh", kept) if kept else ("run", "missing or changed", None)

    def _unprepared(self) -> str:
        """Which of original and oracle is not there; empty if none."""
        pipeline = Pipeline(self.work)
        states = {goal: pipeline.state(goal).status for goal in self._goals}
        found = [(goal, status) for goal, status in states.items() if status != "fresh"]
        return f"the {'original' if found[0][0] == 'train' else 'oracle'} is {found[0][1]}" if found else ""

    def cell(
        self, name: str, given: Mapping[str, Any], rival: Arena | None, force: bool = False, label: str | None = None
    ) -> Artifact:
        """The figures of one method; computed unless the file fits.

        Args:
            name: Of the method.
            given: Its settings where they differ from the defaults.
            rival: The arena whose oracle judges this one's, for ``retrain``.
            force: Compute it anyway.
            label: Of its files; a variant has its own. ``None``: the method's name.

        Raises:
            Exception: Whatever the method raises.
        """
        folder, key = self.folder / (label or name), f"{self.seed}/{label or name}"
        if name in OURS:
            if label and not force:
                self._borrow(self._ours(name, given, folder, self.work), self.folder / name)
            self._ours(name, given, folder, self.work).run(force, goals=["finetune"])
        parts = self._parts(name, given, folder, self.work, rival)
        if not force and (kept := _fresh(_file(folder), parts)):
            self.say(f"{key}: fresh")
            return kept
        self.say(f"{key}: running")
        model, seconds, machine = self._made(name, given, self.work, folder)
        self._log(parts, seconds, machine)
        row = self._judge(name, model, rival) | {"settings": parts["settings"]["method"]}
        return self._keep(_file(folder), row, parts)

    def trial(self, name: str, number: int, given: Mapping[str, Any], force: bool = False) -> Artifact:
        """The score of one point of a method's grid, from training and validation images alone.

        The score is the accuracy on retained validation images less |accuracy on D_f - target|: target 0 for images of
        wholly forgotten classes, and for others the accuracy on held-out images of their classes (of all that stay,
        where none of theirs is held out). A sub-class request is tuned on forgetting the classes that own the
        sub-classes.
        """
        folder, work = self._trial(name, number), self._tuning
        folder.parent.mkdir(exist_ok=True)
        if name in OURS:
            self._ours(name, given, folder, work).run(force, goals=["finetune"])
        parts = self._parts(name, given, folder, work, score=True)
        if not force and (kept := _fresh(_file(folder), parts)):
            return kept
        self.say(f"{self.seed}/{name}: tuning with {tuning.described(given)}")
        model, seconds, machine = self._made(name, given, work, folder)
        self._log(parts, seconds, machine)
        return self._keep(_file(folder), {"score": tuning.score(model, work), "settings": dict(given)}, parts)

    def _trial(self, name: str, number: int) -> Path:
        return self.folder / "tune" / f"{name}-{number}"

    @cached_property
    def _tuning(self) -> RunContext:
        config = self.work.config
        if self.work.inputs.request.kind != "subclasses":
            return self.work
        settings = {
            "seed": self.seed,
            "forget": {"classes": self._owners, **self._before},
            "out": self.folder / "tune",
            "model.checkpoint": self.work.inputs.original.path,
        }
        return self.work.sibling(changed(config, settings), request=False)

    @property
    def _before(self) -> dict[str, Any]:
        """What the config says of earlier requests."""
        return self.base.config.forget.model_dump(include={"already", "already_missing"})

    @property
    def _owners(self) -> list[str]:
        """The classes of what is asked for."""
        data, request = self.base.inputs.data, self.base.inputs.request
        return sorted({data.classes[int(data.concept_class[c])] for c in request.asked})

    def _made(
        self, name: str, given: Mapping[str, Any], work: RunContext, folder: Path
    ) -> tuple[nn.Module, float | None, str]:
        """The model that a method makes, the seconds it took, and where."""
        from megu_cli.execution.runtime import machine

        if name == "retrain":
            known = times.seconds(self.work.directory.out, self.work.directory.log, "oracle")
            return self.oracle_model(), *(known or (None, ""))
        if name in OURS:
            ours = self._ours(name, given, folder, work)
            ours.run(goals=["finetune"])
            return ours.work.unlearned(), *(
                times.method_seconds(ours.work.directory.out, ours.work.directory.log) or (None, "")
            )
        from megu_cli.pipeline.steps.problem import task

        method = methods()[name]
        function, settings = method.load(), method.settings(given)
        model, problem = work.original(), task(work)
        started = time.perf_counter()
        function(model, problem, **settings)
        seconds = time.perf_counter() - started
        broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise MeguError(f"{name} left NaN or infinite weights in {', '.join(broken[:3])}")
        return model.eval(), seconds, machine()

    def _ours(self, name: str, given: Mapping[str, Any], folder: Path, work: RunContext) -> Pipeline:
        """MeGU's pipeline from this arena's original, in a folder of its own."""
        settings = {**OURS[name], **given, "out": folder, "model.checkpoint": self.work.inputs.original.path}
        config = changed(work.config, {"seed": self.seed, **settings})
        folder.mkdir(parents=True, exist_ok=True)
        return Pipeline(work.sibling(config))

    def _borrow(self, ours: Pipeline, source: Path) -> None:
        """Copy from the method's run directory what its variant has not; what does not fit is stale and is rebuilt."""
        out, log = ours.work.directory.out, RunLog(source)
        if ours.state("finetune").status == "fresh":
            return
        for name in ours.all_before(["finetune"])[:-1]:
            # Anew for each stage: what was copied decides whether the next one fits.
            state, stage = Pipeline(ours.work).state(name), STAGES[name]
            if state.status not in ("missing", "stale") or not (source / stage.file).is_file():
                continue
            with writing.replacing(out / stage.file) as temporary:
                shutil.copyfile(source / stage.file, temporary)
            meta = artifacts.read_meta(out / stage.file)
            if (made := log.last(meta["fingerprint"])) and not ours.work.directory.log.last(meta["fingerprint"]):
                ours.work.directory.log.append(made)

    def _judge(self, name: str, model: nn.Module, rival: Arena | None) -> Row:
        """All figures of a model; the oracle itself is judged by the oracle of the next seed."""
        from megu_cli.evaluation.measure import per_class
        from megu_cli.evaluation.ulira import scaled

        measurement = self.oracle if name == "retrain" else self._measurement(model, name)
        judge = rival if name == "retrain" else self
        return {
            "metrics": measurement.figures,
            "comparison": measurement.beside(judge.oracle) if judge else {},
            "entanglement": measurement.entanglement,
            "per_class": per_class(measurement.predictions, self.work.inputs.data),
            # Of each forgotten image, for the attacks that need several seeds.
            CONFIDENCES: scaled(measurement.predictions.train.loss[self.work.inputs.request.forget].numpy())
            .round(4)
            .tolist(),
        }

    def _parts(
        self,
        name: str,
        given: Mapping[str, Any],
        folder: Path,
        work: RunContext,
        rival: Arena | None = None,
        score: bool = False,
    ) -> dict[str, Any]:
        """The key of a cell or of a score."""
        from megu_cli.pipeline.steps.problem import task

        version, own = "1", dict(given)
        judging = STAGES["eval"]
        settings = {"seed": self.seed, **work.inputs.settings(("model.name",) if score else judging.settings)}
        inputs = {key: work.inputs.digest(key) for key in ("train_data", "test_data", "forget")}
        inputs["checkpoint"] = self.work.inputs.digest("checkpoint")
        if name == "retrain":
            own = work.config.train.keyed()
            inputs["rival"] = rival._oracle_content if rival else ""
        elif name in OURS:
            # The content of a file that is named shows in what was made from it; where it lies does not matter.
            own = {key: v.name if isinstance(v, Path) else v for key, v in {**OURS[name], **own}.items()}
            inputs["finetune"] = str(artifacts.read_meta(folder / STAGES["finetune"].file)["content"])
        else:
            method = methods()[name]
            own, version = method.settings(given), method.version
            shared = task(work)
            settings |= {"samples": shared.samples, "batch": shared.batch, "forget_batch": shared.forget_batch}
        if not score:
            inputs["oracle"] = self._oracle_content
        return {
            "stage": f"{'tune' if score else 'compare'} {name}",
            "version": [VERSION, judging.version, version],
            "settings": {**settings, "method": own},
            "inputs": inputs,
        }

    @property
    def _oracle_content(self) -> str:
        return Pipeline(self.work).state("oracle").content

    def _keep(self, path: Path, body: Row, parts: Mapping[str, Any]) -> Artifact:
        fingerprint = artifacts.digest(parts)
        meta = {**parts, "fingerprint": fingerprint, "seed": self.seed, "megu": __version__}
        sealed = artifacts.seal(Artifact(body), meta)
        artifacts.write(path, sealed)
        return sealed

    # -- the clock -------------------------------------------------------------------------------------------------

    def _log(self, parts: Mapping[str, Any], seconds: float | None, machine: str) -> None:
        if seconds is not None:
            entry = {"stage": parts["stage"], "fingerprint": artifacts.digest(parts), "seconds": round(seconds, 6)}
            self.base.directory.log.append({**entry, "machine": machine})

    def clock(self, cell: Artifact) -> Row:
        """Seconds of a cell, and as a share of retraining where both were measured on one machine."""
        own = self.base.directory.log.seconds(cell.meta["fingerprint"])
        oracle = times.seconds(self.work.directory.out, self.work.directory.log, "oracle")
        same = own and oracle and own[1] == oracle[1] and oracle[0]
        return {
            "seconds": own[0] if own else None,
            "time_ratio": own[0] / oracle[0] if own and oracle and same else None,
        }


def _file(folder: Path) -> Path:
    """Where the figures of a method are whose own files lie in ``folder``."""
    return folder.with_name(f"{folder.name}.json")


def _fresh(path: Path, parts: Mapping[str, Any]) -> Artifact | None:
    """The artifact at ``path``, if it is whole and has this key."""
    try:
        found = artifacts.read(path)
    except ArtifactError:
        return None
    return found if found.meta.get("fingerprint") == artifacts.digest(parts) else None
