"""The engine: it runs the stages that are not up to date, and writes what they make.

It knows no stage by name: all that differs between stages stands in the table `megu_cli.pipeline.stages`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from megu_cli import __version__
from megu_cli.errors import ArtifactError, CheckpointError, ConfigError, MeguError
from megu_cli.pipeline import checks
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.freshness import Freshness
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.resume import Resume
from megu_cli.pipeline.stages import Stage
from megu_cli.run import artifacts, files, ownership, writing
from megu_cli.run.artifacts import Artifact

if TYPE_CHECKING:
    from megu_cli.pipeline.steps.product import Product
    from megu_cli.pipeline.tracking import Tracker


class Pipeline(Freshness):
    """The stages of one run directory.

    Args:
        context: The run.
        say: Called with a line for each stage that is skipped or rebuilt, and the reason.
        tracker: Gets the figures of each stage that runs; ``None``: they are reported nowhere.
    """

    def __init__(
        self, context: RunContext, say: Callable[[str], None] = lambda line: None, tracker: Tracker | None = None
    ) -> None:
        super().__init__(context)
        self.say, self.tracker = say, tracker

    def build(self, names: Iterable[str], force: bool = False) -> None:
        """Run single stages, in order; a stage that is fresh is skipped unless forced.

        Raises:
            ArtifactError: An input made by another stage is missing, stale or corrupt; the command that rebuilds it
                is named.
            MeguError: Whatever the stage raises.
        """
        names = list(names)
        self._refuse_unused(names)
        self.refuse_foreign(names, force)
        for name in names:
            if not force and self._skip(name):
                continue
            self._given_or_raise(self.stages[name])
            for upstream in self._upstream(self.stages[name]):
                state = self.state(upstream)
                if upstream in self.stages[name].optional and state.status == "missing":
                    continue
                if state.status != "fresh":
                    raise ArtifactError(
                        f"{name} cannot run: {self.stages[upstream].file} is {state.status} ({state.reason})",
                        f"Rebuild it with `{self._rebuilt_by(upstream)}`, or everything with `megu run`.",
                    )
            self._run(name)

    def _rebuilt_by(self, name: str) -> str:
        """The command to begin with: that of the first stage upstream that is not fresh."""
        for upstream in self._upstream(self.stages[name]):
            if self.state(upstream).status != "fresh" and not self._covered(upstream, self._states):
                return self._rebuilt_by(upstream)
        return self.stages[name].command

    def run(self, force: bool = False, goals: Sequence[str] | None = None) -> None:
        """Bring the run directory up to date: rebuild what is stale, corrupt or missing, and only that.

        Args:
            force: Rebuild all of it.
            goals: The stages that must stand at the end, with what they are made from; ``None``: all of this config.

        Raises:
            MeguError: Whatever a stage raises; what was finished stays.
        """
        done: set[str] = set()
        if goals is None:
            self._check_first(self.order())
        self.refuse_foreign(self.all_before(self.order() if goals is None else goals), force)
        if goals is None:
            self.preflight(force)
        # All that is wrong with what the user gave shows now, before the first hour of work.
        for name in self.order() if goals is None else goals:
            self._given_or_raise(self.stages[name])
        for name in goals if goals is not None else [*self.goals(), *self.order()] if force else self.goals():
            self._ensure(name, done, force)

    def validate(self, names: Iterable[str] | None = None) -> None:
        """See that nothing that the user gave keeps these stages, or all of this config, from running.

        Raises:
            InputError: Something does; it is what `run` would raise.
        """
        wanted = self.order() if names is None else list(names)
        self._refuse_unused(wanted)
        self._check_first(wanted)
        for name in wanted:
            self._given_or_raise(self.stages[name])

    def _refuse_unused(self, names: Iterable[str]) -> None:
        """See that this config has these stages.

        Raises:
            ConfigError: It has not.
        """
        for name in names:
            if name not in self.stages:
                raise ConfigError(
                    f"method: {self.context.config.method} has no stage {name}",
                    "`megu run` makes all that it needs; set method: megu to unlearn instead.",
                )

    def _check_first(self, names: Iterable[str]) -> None:
        for given in dict.fromkeys(given for name in names for given in self._given(self.stages[name])):
            if INPUTS[given].checked_first:
                self.context.inputs.digest(given)

    def preflight(self, force: bool = False) -> None:
        """See that a checkpoint of the user's classifies the data, where anything is to be computed from it.

        The first process looks, and the others stop where it does.

        Raises:
            CheckpointError: It does not; the likeliest cause is named.
        """
        if not self.context.inputs.unproven or not (
            force or any(self.state(name).status != "fresh" for name in self.goals())
        ):
            return
        failure = None
        if self.context.runtime.processes.first:
            try:
                found = checks.preflight(self.context)
                if found.fault:
                    raise found.fault
                self.say(f"preflight: {found.line}")
            except MeguError as error:
                failure = error
        if not self.context.runtime.processes.agreed(failure is None):
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
            for upstream in self._upstream(self.stages[name]):
                self._ensure(upstream, done, force)
        # An upstream that was rebuilt to the same content leaves this one fresh.
        if force or not self._skip(name):
            self._run(name)
        done.add(name)

    def _skip(self, name: str) -> bool:
        if self.state(name).status == "fresh":
            self.say(f"{name}: fresh")
            if self.context.runtime.processes.first:
                (self.context.directory.out / files.resume_file(name)).unlink(
                    missing_ok=True
                )  # killed just before it was deleted
            return True
        return False

    def _given_or_raise(self, stage: Stage) -> None:
        for name in self._given(stage):
            self.context.inputs.digest(name)

    def _run(self, name: str) -> None:
        """Run one stage whose inputs are all fresh, and write what it makes."""
        self.context.ready()
        self.context.runtime.start()
        stage, processes = self.stages[name], self.context.runtime.processes
        before = self.state(name)
        why = f" ({before.status}: {before.reason})" if before.status in ("stale", "corrupt") else ""
        self.say(f"{name}: running{why}")
        parts = self._parts(stage)
        inputs: dict[str, Artifact] = {}
        lineage: dict[str, Any] = {}
        for upstream in self._upstream(stage):
            path = self.context.directory.out / self.stages[upstream].file
            if upstream in stage.optional and not path.exists():
                continue
            artifact = inputs[upstream] = artifacts.read(path)
            parts["inputs"][upstream] = artifact.content
            lineage |= artifact.meta["lineage"]
            lineage[upstream] = {k: artifact.meta[k] for k in ("version", "settings", "inputs", "fingerprint")}
        self.context.preload()
        processes.wait()  # all processes have read what is there, before anything changes
        started = time.perf_counter()
        resume = Resume(
            self.context.directory.out / files.resume_file(name),
            artifacts.digest([parts, processes.world]),
            self.context.config.checkpoint_seconds,
            self.say,
        )
        product = None
        if processes.first or stage.shared:
            product = stage.load()(replace(self.context, resume=resume), inputs)
        # What was done before a kill counts: a time is that of the whole stage.
        seconds = resume.seconds + time.perf_counter() - started
        if processes.first and product is not None:
            self._write(stage, product, parts, lineage, seconds)
            resume.path.unlink(missing_ok=True)
            if self.tracker:
                self.tracker.stage(name, product.artifact.body, seconds)
        processes.wait()
        stage.done(self.context.inputs)
        self._states.clear()

    def _write(
        self,
        stage: Stage,
        product: Product,
        parts: Mapping[str, Any],
        lineage: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Write what a stage has made, its artifact last, and log it."""
        from megu_cli.execution.runtime import machine

        out, written = self.context.directory.out, {}
        with contextlib.ExitStack() as stack:
            # Entered first, so that it takes its place last.
            for file in (stage.file, *product.weights, *product.files):
                (out / file).parent.mkdir(exist_ok=True)
                written[file] = stack.enter_context(writing.replacing(out / file))
            for file, state in product.weights.items():
                artifacts.save_tensors(written[file], state, {"format": "pt", **product.metadata})
            for file, content in product.files.items():
                written[file].write_bytes(content)
            others = {file: artifacts.file_digest(written[file]) for file in product.files}
            sizes = {file: written[file].stat().st_size for file in (*product.weights, *product.files)}
            meta = {
                **parts,
                "fingerprint": artifacts.digest(parts),
                "lineage": lineage,
                "weights": {file: artifacts.tensor_digest(written[file]) for file in product.weights},
                **({"files": others} if others else {}),
                **({"sizes": sizes} if sizes else {}),
                "seed": self.context.config.seed,
                "megu": __version__,
            }
            sealed = artifacts.seal(Artifact(product.artifact.body, product.artifact.tensors), meta)
            artifacts.save(written[stage.file], sealed)
            # Before any file takes its place, so that a run that is killed now knows them as its own later.
            self.context.directory.log.append(
                {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "stage": stage.name,
                    "fingerprint": meta["fingerprint"],
                    "content": sealed.content,
                    "seconds": round(seconds, 3),
                    "device": str(self.context.runtime.device),
                    "machine": machine(),
                    "files": {file: ownership.parts(path) for file, path in written.items()},
                }
            )
        self.context.directory.keep_digests()
        for note in product.notes:
            self.say(f"{stage.name}: {note}")
