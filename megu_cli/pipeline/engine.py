"""The stage table, and what follows from it: what is fresh, what must run, and running it.

A stage's key is the content it is made from: its settings and the digests of its inputs. An artifact carries its
key, so it is its own cache entry, in this directory or handed over to another.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megu_cli import __version__
from megu_cli.errors import ArtifactError, CheckpointError, ForeignFileError, MeguError
from megu_cli.pipeline import bodies
from megu_cli.pipeline.resume import Resume, resume_file
from megu_cli.pipeline.workspace import ANSWERS, Workspace
from megu_cli.run import artifacts, ownership, writing
from megu_cli.run.artifacts import Artifact

if TYPE_CHECKING:
    from megu_cli.pipeline.steps.product import Product


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: What the commands and the artifacts call it.
        function: Its function, as ``module:name`` in `megu_cli.pipeline.steps`; imported when it runs.
        file: The artifact; written last, so that its presence means that the stage is complete.
        command: What rebuilds it.
        settings: Dotted keys of the config that it uses.
        given: Inputs that no stage makes; see `Workspace.digest`.
        needs: Stages whose artifacts it reads, in the order in which they are made where they are missing. The ratings
            come before any training: they may fail for reasons outside, such as a server, a key, a model's answers.
        weights: Plain weight files that it writes beside the artifact.
        version: Raised whenever the same inputs would give another result.
        shared: Whether several processes share its work; otherwise the first does it, and the others wait.
    """

    name: str
    function: str
    file: str
    command: str
    settings: tuple[str, ...]
    given: tuple[str, ...]
    needs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    version: int = 1
    shared: bool = False

    def load(self) -> Callable[[Workspace, Mapping[str, Artifact]], Product]:
        """The function that makes the artifact."""
        module, _, name = self.function.partition(":")
        function: Callable[[Workspace, Mapping[str, Artifact]], Product] = getattr(
            importlib.import_module(f"megu_cli.pipeline.steps.{module}"), name
        )
        return function


_TRAIN = ("seed", "model.name", "train")
# All of config.noise but its strength, which the finetuning uses.
_NOISE = tuple(f"noise.{key}" for key in ("use", "negative", "batch", "steps", "lr", "penalty"))
_METHOD = ("train_data", "forget")
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "train",
            "train:train",
            "original.safetensors",
            "megu train",
            (*_TRAIN, "data.validation"),
            ("train_data",),
            shared=True,
            version=2,
        ),
        Stage(
            "oracle",
            "train:oracle",
            "oracle.safetensors",
            "megu train --retain-only",
            _TRAIN,
            _METHOD,
            shared=True,
            version=2,
        ),
        # What else determines the ratings depends on the backend: see _RATING.
        Stage(
            "similarity",
            "similarity:similarity",
            "similarity.json",
            "megu similarity",
            ("mllm.backend",),
            ("concepts",),
        ),
        Stage(
            "transition",
            "similarity:transition",
            "transition.safetensors",
            "megu similarity",
            ("transition",),
            ("concepts",),
            ("similarity",),
        ),
        Stage(
            "labels",
            "labels:labels",
            "labels.safetensors",
            "megu labels",
            ("seed", "model.name", "labels"),
            _METHOD,
            ("transition", "checkpoint"),
            version=6,
        ),
        Stage(
            "noise",
            "noise:noise",
            "noise.safetensors",
            "megu noise",
            ("seed", "model.name", "finetune.batch", *_NOISE),
            _METHOD,
            ("checkpoint", "labels"),
            shared=True,
            version=2,
        ),
        Stage(
            "finetune",
            "finetune:finetune",
            "finetune.json",
            "megu finetune",
            ("seed", "model.name", "finetune", "labels.source", "noise.strength"),
            _METHOD,
            ("transition", "checkpoint", "labels", "noise"),
            ("model.safetensors",),
            shared=True,
            version=12,
        ),
        Stage(
            "eval",
            "evaluate:evaluate",
            "eval.json",
            "megu eval",
            (
                "seed",
                "model.name",
                "eval.attack_samples",
                "eval.probe_samples",
                "eval.relearn_epochs",
            ),
            (*_METHOD, "test_data"),
            ("checkpoint", "finetune", "oracle"),
            version=6,
            shared=True,
        ),
    )
}
# mllm.backend -> settings and given inputs that determine its ratings; waiting times, concurrency and keys do not.
_RATING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "recorded": ((), ("ratings",)),
    "endpoint": (("mllm.model", "mllm.base_url"), ("prompt",)),
    "local": (("mllm.dtype",), ("prompt", "rater_model")),
    "clip": (("mllm.dtype",), ("prompt", "rater_model")),
}
# And of every backend that may be shown images.
_SHOWING = (("mllm.images", "mllm.images_per_class", "mllm.image_size"), ("train_data", "forget"))
# What the report and the figures of time count as the method's own work.
METHOD_STAGES = ("labels", "noise", "finetune")

Status = Literal["fresh", "absent", "stale", "missing", "corrupt", "blocked"]


@dataclass(frozen=True)
class State:
    """Where a stage stands.

    Attributes:
        status: ``absent`` means: not there, and not needed, since a later artifact fits without it.
        reason: Why it is not fresh; which part of the key changed.
        meta: Of the artifact, where it can be read.
    """

    status: Status
    reason: str = ""
    meta: Mapping[str, Any] | None = None

    @property
    def content(self) -> str:
        """Content digest of a fresh artifact."""
        assert self.meta is not None
        return str(self.meta["content"])


class Pipeline:
    """The stages of one run directory.

    Args:
        work: The inputs, and the run directory.
        say: Told in a line what is skipped and what is rebuilt, and why.
    """

    def __init__(self, work: Workspace, say: Callable[[str], None] = lambda line: None) -> None:
        self.work = work
        self.say = say
        self._states: dict[str, State] = {}

    # -- what is there ---------------------------------------------------------------------------------------------

    def state(self, name: str) -> State:
        """Where a stage stands; remembered until something runs."""
        if name not in self._states:
            self._states[name] = self._assess(STAGES[name])
        return self._states[name]

    def status(self) -> dict[str, State]:
        """Where all stages of this config stand, in order."""
        states = {name: self.state(name) for name in self.order()}
        goals = self.goals()
        for name, state in states.items():
            if state.status == "missing" and name not in goals and self._covered(name, states):
                states[name] = State("absent", "not there, and not needed: what was made from it fits")
        return states

    def order(self) -> list[str]:
        """The stages that this config has."""
        skipped = {"train"} if self.work.own_checkpoint else set()
        if not self.work.config.eval.oracle and not (self.work.out / STAGES["oracle"].file).exists():
            skipped.add("oracle")
        return [name for name in STAGES if name not in skipped]

    def goals(self) -> list[str]:
        """The stages that must stand at the end of `megu run`."""
        return ["finetune", "eval"]

    def _covered(self, name: str, states: Mapping[str, State]) -> bool:
        readers = [s.name for s in STAGES.values() if s.name in states and name in self._upstream(s)]
        return bool(readers) and all(
            states[r].status == "fresh" or (states[r].status == "missing" and self._covered(r, states)) for r in readers
        )

    def _upstream(self, stage: Stage) -> list[str]:
        """The stages that an artifact is made from."""
        own = self.work.own_checkpoint
        names = [
            "train" if need == "checkpoint" else need for need in stage.needs if not (need == "checkpoint" and own)
        ]
        return [name for name in names if name != "oracle" or self._uses_oracle()]

    def _uses_oracle(self) -> bool:
        return self.work.config.eval.oracle or (self.work.out / STAGES["oracle"].file).exists()

    def _given(self, stage: Stage) -> list[str]:
        own = self.work.own_checkpoint
        return [
            *stage.given,
            *(self._rating()[1] if stage.name == "similarity" else ()),
            *(["checkpoint"] if own and "checkpoint" in stage.needs else []),
            *(["wrapping"] if own and stage.name == "finetune" and self.work.wrapped else []),
        ]

    def _settings(self, stage: Stage) -> list[str]:
        return [*stage.settings, *(self._rating()[0] if stage.name == "similarity" else ())]

    def _rating(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Settings and given inputs that determine this config's ratings."""
        mllm = self.work.config.mllm
        settings, given = _RATING[mllm.backend]
        if mllm.backend == "recorded":
            return settings, given
        if mllm.images == "none":
            return (*settings, "mllm.images"), given
        return (*settings, *_SHOWING[0]), (*given, *_SHOWING[1])

    def _assess(self, stage: Stage) -> State:
        state = self._compared(stage)
        if state.status == "fresh":
            return state
        try:
            self._refuse_foreign(stage)
        except ForeignFileError as error:
            return State("blocked", error.message, state.meta)
        except MeguError:
            pass  # what is at fault is the state's own to tell
        return state

    def _compared(self, stage: Stage) -> State:
        path = self.work.out / stage.file
        meta: dict[str, Any] | None = None
        trouble: State | None = None
        if not path.exists():
            trouble = State("missing", "not made yet")
        else:
            try:
                meta = artifacts.read_meta(path, artifacts.STAGE_KEYS)
                artifacts.check_products(self.work.out, meta)
                if fault := bodies.fault(stage.name, artifacts.read_body(path)):
                    trouble = State("corrupt", f"{stage.file} is damaged: {fault}")
            except ForeignFileError as error:
                return State("blocked", error.message)
            except ArtifactError as error:
                trouble = State("corrupt", error.message)
            except OSError as error:
                gone = Path(error.filename).name if error.filename else stage.file
                trouble = State("missing", f"{gone} is not there ({error.strerror})")
        try:
            parts = self._parts(stage)
        except MeguError as error:
            return State("blocked", error.message.splitlines()[0])
        if trouble or meta is None:
            return trouble or State("missing", "not made yet")
        stale = ""
        # An oracle that was purged since still counts, also where the config does not ask for one.
        purged = ["oracle"] if "oracle" in meta["inputs"] else []
        for name in dict.fromkeys([*self._upstream(stage), *purged]):
            state = self.state(name)
            if state.status == "fresh":
                parts["inputs"][name] = state.content
            elif name in meta["inputs"]:
                parts["inputs"][name] = meta["inputs"][name]
            if state.status != "fresh" and not (state.status == "missing" and self._fits_without(name, meta)):
                stale = stale or f"{name} is {state.status}" + (f": {state.reason}" if state.reason else "")
        reason = _difference(meta, parts) or stale
        return State("stale", reason, meta) if reason else State("fresh", "", meta)

    def _parts(self, stage: Stage) -> dict[str, Any]:
        """The parts of a stage's key that do not come from other stages."""
        return {
            "stage": stage.name,
            "version": stage.version,
            "settings": self.work.settings(self._settings(stage)),
            "inputs": {name: self.work.digest(name) for name in self._given(stage)},
        }

    def _fits_without(self, name: str, meta: Mapping[str, Any]) -> bool:
        """Whether an artifact whose upstream file is gone was made from what that stage would be made from today."""
        recorded = meta["lineage"].get(name)
        if recorded is None or name not in meta["inputs"]:
            return False
        stage = STAGES[name]
        parts = self._parts(stage)
        for upstream in self._upstream(stage):
            state = self.state(upstream)
            if state.status == "fresh":
                parts["inputs"][upstream] = state.content
            elif state.status == "missing" and self._fits_without(upstream, {**recorded, "lineage": meta["lineage"]}):
                parts["inputs"][upstream] = recorded["inputs"][upstream]
            else:
                return False
        return not _difference(recorded, parts)

    # -- making it -------------------------------------------------------------------------------------------------

    def build(self, names: Iterable[str], force: bool = False) -> None:
        """Run single stages, in order; a stage that is fresh is skipped unless forced.

        Raises:
            ArtifactError: An input made by another stage is missing, stale or corrupt; the command that rebuilds it
                is named.
            MeguError: Whatever the stage raises.
        """
        names = list(names)
        self.refuse_foreign(names, force)
        for name in names:
            if not force and self._skip(name):
                continue
            self._given_or_raise(STAGES[name])
            for upstream in self._upstream(STAGES[name]):
                state = self.state(upstream)
                if upstream == "oracle" and state.status == "missing":
                    continue
                if state.status != "fresh":
                    raise ArtifactError(
                        f"{name} cannot run: {STAGES[upstream].file} is {state.status} ({state.reason})",
                        f"Rebuild it with `{self._rebuilt_by(upstream)}`, or everything with `megu run`.",
                    )
            self._run(name)

    def _rebuilt_by(self, name: str) -> str:
        """The command to begin with: that of the first stage upstream that is not fresh."""
        for upstream in self._upstream(STAGES[name]):
            if self.state(upstream).status != "fresh" and not self._covered(upstream, self._states):
                return self._rebuilt_by(upstream)
        return STAGES[name].command

    def run(self, force: bool = False, goals: Sequence[str] | None = None) -> None:
        """Bring the run directory up to date: rebuild what is stale, corrupt or missing, and only that.

        Args:
            force: Rebuild all of it.
            goals: The stages that must stand at the end, with what they are made from; ``None``: all of this config.

        Raises:
            MeguError: Whatever a stage raises; what was finished stays.
        """
        done: set[str] = set()
        # Whether recorded ratings are complete their file alone tells; what follows reads images and weights.
        if goals is None and "ratings" in self._given(STAGES["similarity"]):
            self.work.digest("ratings")
        self.refuse_foreign(self._all_upstream(self.order() if goals is None else goals), force)
        if goals is None:
            self.preflight(force)
        # All that is wrong with what the user gave shows now, before the first hour of work.
        for name in self.order() if goals is None else goals:
            self._given_or_raise(STAGES[name])
        for name in goals if goals is not None else [*self.goals(), *self.order()] if force else self.goals():
            self._ensure(name, done, force)

    def preflight(self, force: bool = False) -> None:
        """See that a checkpoint of the user's classifies the data, where anything is to be computed from it.

        The first process looks, and the others stop where it does.

        Raises:
            CheckpointError: It does not; the likeliest cause is named.
        """
        if not self.work.unproven or not (force or any(self.state(name).status != "fresh" for name in self.goals())):
            return
        failure = None
        if self.work.crew.first:
            try:
                found = self.work.preflight()
                if found.fault:
                    raise found.fault
                self.say(f"preflight: {found.line}")
            except MeguError as error:
                failure = error
        if not self.work.crew.agreed(failure is None):
            raise failure or CheckpointError("the preflight of the first process failed")

    def plan(self, names: Iterable[str] | None = None, force: bool = False) -> list[tuple[str, str, str]]:
        """(stage, run or keep, reason) for each stage, without running any.

        Raises:
            ForeignFileError: A stage would replace a file that megu did not write.
        """
        states = self.status()
        wanted = [name for name in self.order() if names is None or name in names]
        self.refuse_foreign(wanted, force)
        return [
            (name, "keep", states[name].reason or "fresh")
            if states[name].status in ("fresh", "absent") and not force
            else (name, "run", states[name].reason or "forced")
            for name in wanted
        ]

    def _ensure(self, name: str, done: set[str], force: bool) -> None:
        if name in done:
            return
        if force or self.state(name).status != "fresh":
            for upstream in self._upstream(STAGES[name]):
                self._ensure(upstream, done, force)
        # An upstream that was rebuilt to the same content leaves this one fresh.
        if force or not self._skip(name):
            self._run(name)
        done.add(name)

    def _skip(self, name: str) -> bool:
        if self.state(name).status == "fresh":
            self.say(f"{name}: fresh")
            if self.work.crew.first:
                (self.work.out / resume_file(name)).unlink(missing_ok=True)  # killed just before it was deleted
            return True
        return False

    def _given_or_raise(self, stage: Stage) -> None:
        for name in self._given(stage):
            self.work.digest(name)

    def refuse_foreign(self, names: Iterable[str], force: bool = False) -> None:
        """See that these stages replace nothing but what megu wrote; what is fresh is replaced only if forced.

        Raises:
            ForeignFileError: They would: the file is named.
        """
        running = [STAGES[name] for name in names if force or self.state(name).status not in ("fresh", "absent")]
        for stage in running:
            self._refuse_foreign(stage)
        if running:
            ownership.refuse_foreign(self.work.out, self.work.log.file.name)

    def _refuse_foreign(self, stage: Stage) -> None:
        recorded = self._recorded(stage)
        for name in self._written(stage):
            path = self.work.out / name
            if name in recorded and path.is_file() and not path.is_symlink():
                digest = artifacts.tensor_digest if name in stage.weights else artifacts.file_digest
                with contextlib.suppress(OSError, ArtifactError):
                    if digest(path) == recorded[name]:
                        continue
            ownership.refuse_foreign(self.work.out, name, self.work.log.written(name))

    def _recorded(self, stage: Stage) -> dict[str, str]:
        """Digests that a stage's artifact, which may be damaged, gives of the files beside it."""
        if not stage.weights:
            return {}
        try:
            with artifacts.opened(self.work.out / stage.file) as stream:
                meta = artifacts.strict_json(stream.read())["meta"]
            return {**meta["weights"], **meta.get("files", {})}
        except (OSError, ValueError, KeyError, TypeError, ArtifactError):
            return {}

    def _written(self, stage: Stage) -> list[str]:
        """The files that a stage may write, relative to the run directory."""
        names = [stage.file, *stage.weights, resume_file(stage.name)]
        if stage.name == "similarity" and self.work.config.mllm.backend != "recorded":
            names.append(ANSWERS)
        if stage.name == "finetune":
            names += self.work.unlearned_files
        return names

    def _all_upstream(self, names: Iterable[str]) -> list[str]:
        """These stages and all that they are made from."""
        found: dict[str, None] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = None
                waiting += self._upstream(STAGES[name])
        return [name for name in STAGES if name in found]

    def _run(self, name: str) -> None:
        """Run one stage whose inputs are all fresh, and write what it makes."""
        stage, crew = STAGES[name], self.work.crew
        before = self.state(name)
        why = f" ({before.status}: {before.reason})" if before.status in ("stale", "corrupt") else ""
        self.say(f"{name}: running{why}")
        parts = self._parts(stage)
        inputs: dict[str, Artifact] = {}
        lineage: dict[str, Any] = {}
        for upstream in self._upstream(stage):
            path = self.work.out / STAGES[upstream].file
            if upstream == "oracle" and not path.exists():
                continue
            artifact = inputs[upstream] = artifacts.read(path)
            parts["inputs"][upstream] = artifact.content
            lineage |= artifact.meta["lineage"]
            lineage[upstream] = {k: artifact.meta[k] for k in ("version", "settings", "inputs", "fingerprint")}
        self.work.preload()
        crew.wait()  # all processes have read what is there, before anything changes
        started = time.perf_counter()
        resume = Resume(
            self.work.out / resume_file(name),
            artifacts.digest([parts, crew.world]),
            self.work.config.checkpoint_seconds,
            self.say,
        )
        self.work.checkpoints = resume
        product = None
        try:
            if crew.first or stage.shared:
                product = stage.load()(self.work, inputs)
        finally:
            self.work.checkpoints = None
        # What was done before a kill counts: a time is that of the whole stage.
        seconds = resume.seconds + time.perf_counter() - started
        if crew.first and product is not None:
            self._write(stage, product, parts, lineage, inputs.get("oracle"), seconds)
            resume.path.unlink(missing_ok=True)
        crew.wait()
        self.work.forget_loaded(name)
        self._states.clear()

    def _write(
        self,
        stage: Stage,
        product: Product,
        parts: Mapping[str, Any],
        lineage: Mapping[str, Any],
        oracle: Artifact | None,
        seconds: float,
    ) -> None:
        """Write what a stage has made, its artifact last, and log it."""
        from megu_cli.execution.runtime import machine

        body = dict(product.artifact.body)
        if stage.name == "eval":
            body["time"] = self._times(lineage, oracle)
        out, written = self.work.out, {}
        with contextlib.ExitStack() as stack:
            # Entered first, so that it takes its place last.
            for file in (stage.file, *product.weights, *product.files):
                (out / file).parent.mkdir(exist_ok=True)
                written[file] = stack.enter_context(writing.replacing(out / file))
            for file, state in product.weights.items():
                artifacts.save_tensors(written[file], state, {"format": "pt", **product.metadata})
            for file, content in product.files.items():
                written[file].write_bytes(content)
            files = {file: artifacts.file_digest(written[file]) for file in product.files}
            sizes = {file: written[file].stat().st_size for file in (*product.weights, *product.files)}
            meta = {
                **parts,
                "fingerprint": artifacts.digest(parts),
                "lineage": lineage,
                "weights": {file: artifacts.tensor_digest(written[file]) for file in product.weights},
                **({"files": files} if files else {}),
                **({"sizes": sizes} if sizes else {}),
                "seed": self.work.config.seed,
                "megu": __version__,
            }
            sealed = artifacts.seal(Artifact(body, product.artifact.tensors), meta)
            artifacts.save(written[stage.file], sealed)
            # Before any file takes its place, so that a run that is killed now knows them as its own later.
            self.work.log.append(
                {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "stage": stage.name,
                    "fingerprint": meta["fingerprint"],
                    "content": sealed.content,
                    "seconds": round(seconds, 3),
                    "device": str(self.work.device),
                    "machine": machine(),
                    "files": {file: ownership.parts(path) for file, path in written.items()},
                }
            )
        self.work.keep_memo()
        for note in product.notes:
            self.say(f"{stage.name}: {note}")

    def seconds(self, name: str) -> tuple[float, str] | None:
        """Seconds that the artifact of a stage took, and where; ``None`` if not known."""
        meta = artifacts.read_meta(self.work.out / STAGES[name].file)
        return self.work.log.seconds(str(meta["fingerprint"]))

    def method_seconds(self) -> tuple[float, str] | None:
        """Seconds that the method's own work for model.safetensors took, and where; ``None`` if not known."""
        lineage = artifacts.read_meta(self.work.out / STAGES["finetune"].file)
        keys = [lineage["lineage"][name]["fingerprint"] for name in METHOD_STAGES[:-1]] + [lineage["fingerprint"]]
        known = [entry for key in keys if (entry := self.work.log.seconds(key))]
        if len(known) < len(keys) or len({machine for _, machine in known}) != 1:
            return None
        return sum(seconds for seconds, _ in known), known[0][1]

    def _times(self, lineage: Mapping[str, Any], oracle: Artifact | None) -> dict[str, float | None]:
        """Seconds of each stage, and the method's as a share of retraining; ``None`` where runs.jsonl does not tell."""
        known = {name: self.work.log.seconds(lineage[name]["fingerprint"]) for name in STAGES if name in lineage}
        seconds = {name: entry[0] for name, entry in known.items() if entry}
        machines = {entry[1] for name, entry in known.items() if entry}

        def ratio(names: tuple[str, ...]) -> float | None:
            if len(machines) != 1 or not seconds.get("oracle") or not all(name in seconds for name in names):
                return None
            return sum(seconds[name] for name in names) / seconds["oracle"]

        own = ratio(METHOD_STAGES)
        share = reached(oracle.body.get("validation_acc", [])) if oracle else None
        return {
            **{f"{name}_s": value for name, value in seconds.items()},
            "time_ratio": own,
            "time_ratio_total": ratio(("similarity", "transition", *METHOD_STAGES)),
            "time_ratio_reached": own / share if own is not None and share else None,
        }


def reached(validation: Sequence[float]) -> float | None:
    """Share of a training after which it first came within 0.2 points of its final validation accuracy.

    A recipe that is longer than it need be flatters whatever its time is held against; this share corrects for it.
    """
    if not validation:
        return None
    first = next(epoch for epoch, value in enumerate(validation) if value >= validation[-1] - 0.002)
    return (first + 1) / len(validation)


_INPUT_NAMES = {
    "train_data": "the training data",
    "test_data": "the test data",
    "forget": "the forget request",
    "concepts": "the classes asked about",
    "ratings": "the recorded ratings",
    "prompt": "the wording of the questions",
    "rater_model": "the model that rates",
    "checkpoint": "the checkpoint",
    "wrapping": "what stands beside the weights in the checkpoint",
}


def _difference(recorded: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Which parts of a key changed, in words; empty if none."""
    changes = []
    if recorded["version"] != parts["version"]:
        changes.append(f"the stage's version ({recorded['version']} -> {parts['version']})")
    old, new = _flat(recorded["settings"]), _flat(parts["settings"])
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            changes.append(f"{key} {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}")
    for name in sorted(recorded["inputs"].keys() | parts["inputs"].keys()):
        if recorded["inputs"].get(name) != parts["inputs"].get(name):
            changes.append(_INPUT_NAMES.get(name, STAGES[name].file if name in STAGES else name))
    return "changed: " + ", ".join(changes) if changes else ""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
