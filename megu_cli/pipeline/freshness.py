"""Where the stages of a run directory stand: up to date, missing, stale or damaged.

A stage's key is the content that its artifact is made from: its settings and the digests of its inputs. An artifact
carries its key. So it is its own cache entry, in this directory or handed over to another.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megu_cli.config import get
from megu_cli.errors import ArtifactError, ForeignFileError, MeguError
from megu_cli.pipeline import bodies
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.stages import STAGES, Stage, of_config
from megu_cli.run import artifacts, files, ownership

# Settings that choose among the rows of a stage, with what they are where a key does not name them.
_CHOOSING = {"method": "megu", "transition.from": "ratings"}

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


class Freshness:
    """Compares the artifacts of a run directory with what the config and the inputs ask for.

    Args:
        context: The run.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.stages = of_config(context.config)
        self._states: dict[str, State] = {}

    def state(self, name: str) -> State:
        """Where a stage stands; remembered until a stage runs."""
        if name not in self._states:
            self._states[name] = self._assess(self.stages[name])
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
        given, needed = self._replaced(), self.all_before(self.goals())
        return [
            stage.name
            for stage in self.stages.values()
            if stage.name not in given and (self._asked_for(stage) or stage.name in needed or self._there(stage))
        ]

    def goals(self) -> list[str]:
        """The stages that must stand at the end of `megu run`."""
        return [stage.name for stage in self.stages.values() if stage.goal]

    def all_before(self, names: Iterable[str]) -> list[str]:
        """These stages and all stages that they are made from, in order."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self._upstream(self.stages[name])
        return [name for name in self.stages if name in found]

    # -- the graph -------------------------------------------------------------------------------------------------

    def _there(self, stage: Stage) -> bool:
        return (self.context.directory.out / stage.file).exists()

    def _replaced(self) -> set[str]:
        """The stages whose result the user gives."""
        return {row.made_by for row in INPUTS.values() if row.made_by and row.applies(self.context.inputs)}

    def _asked_for(self, stage: Stage) -> bool:
        """True if the config asks for a stage, whether or not another one reads it."""
        return not stage.switch or get(self.context.config, stage.switch) is True

    def _required(self, stage: Stage) -> list[str]:
        """The stages that are made for a stage where they are missing."""
        names = []
        for need in stage.needs:
            if need in self.stages:
                names.append(need)
            elif INPUTS[need].made_by and not INPUTS[need].applies(self.context.inputs):
                names.append(INPUTS[need].made_by)
        return names + [n for n in self._optional(stage) if self.stages[n].switch and self._asked_for(self.stages[n])]

    def _optional(self, stage: Stage) -> list[str]:
        """The stages that a stage reads if they are there; a config may not have all of them."""
        return [name for name in stage.optional if name in self.stages]

    def _upstream(self, stage: Stage) -> list[str]:
        """The stages that an artifact is made from."""
        required = self._required(stage)
        without = {*required, *self._replaced()}
        return required + [n for n in self._optional(stage) if n not in without and self._there(self.stages[n])]

    def _given(self, stage: Stage) -> list[str]:
        """The inputs of a stage that no stage makes."""
        needed = (need for need in stage.needs if need in INPUTS and INPUTS[need].applies(self.context.inputs))
        return [*stage.inputs, *stage.by_config(self.context.config)[1], *needed]

    def _covered(self, name: str, states: Mapping[str, State]) -> bool:
        """True if everything that is made from a missing artifact is there and fits."""
        readers = [s.name for s in self.stages.values() if s.name in states and name in self._required(s)]
        return bool(readers) and all(
            states[r].status == "fresh" or (states[r].status == "missing" and self._covered(r, states)) for r in readers
        )

    # -- the comparison --------------------------------------------------------------------------------------------

    def _assess(self, stage: Stage) -> State:
        state = self._compared(stage)
        if state.status == "fresh":
            return state
        try:
            self._refuse_foreign(stage)
        except ForeignFileError as error:
            return State("blocked", error.message, state.meta)
        except MeguError:
            pass  # the state itself says what is at fault
        return state

    def _compared(self, stage: Stage) -> State:
        path = self.context.directory.out / stage.file
        meta: dict[str, Any] | None = None
        trouble: State | None = None
        if not path.exists():
            trouble = State("missing", "not made yet")
        else:
            try:
                meta = artifacts.read_meta(path, artifacts.STAGE_KEYS)
                artifacts.check_products(self.context.directory.out, meta)
                if fault := bodies.fault(stage, artifacts.read_body(path)):
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
        # An optional artifact that was purged since still counts.
        purged = [upstream for upstream in self._optional(stage) if upstream in meta["inputs"]]
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
            "settings": self.context.inputs.settings([*stage.settings, *stage.by_config(self.context.config)[0]]),
            "inputs": {name: self.context.inputs.digest(name) for name in self._given(stage)},
        }

    def _fits_without(self, name: str, meta: Mapping[str, Any]) -> bool:
        """True if an artifact whose upstream file is gone was made from what that stage would be made from today."""
        recorded = meta["lineage"].get(name)
        if recorded is None or name not in meta["inputs"]:
            return False
        stage = self.stages[name]
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

    # -- files of the user's ---------------------------------------------------------------------------------------

    def refuse_foreign(self, names: Iterable[str], force: bool = False) -> None:
        """Check that these stages replace only files that megu wrote.

        An artifact that is up to date is replaced only if ``force`` is given.

        Raises:
            ForeignFileError: A stage would replace a file of the user's; the message names it.
        """
        running = [self.stages[name] for name in names if force or self.state(name).status not in ("fresh", "absent")]
        for stage in running:
            self._refuse_foreign(stage)
        if running:
            ownership.refuse_foreign(self.context.directory.out, self.context.directory.log.file.name)

    def _refuse_foreign(self, stage: Stage) -> None:
        recorded = self._recorded(stage)
        for name in self._written(stage):
            path = self.context.directory.out / name
            if name in recorded and path.is_file() and not path.is_symlink():
                digest = artifacts.tensor_digest if name in stage.weights else artifacts.file_digest
                with contextlib.suppress(OSError, ArtifactError):
                    if digest(path) == recorded[name]:
                        continue
            ownership.refuse_foreign(self.context.directory.out, name, self.context.directory.log.written(name))

    def _recorded(self, stage: Stage) -> dict[str, str]:
        """Digests of the files beside an artifact, as the artifact records them; it may be damaged."""
        if not stage.weights:
            return {}
        try:
            with artifacts.opened(self.context.directory.out / stage.file) as stream:
                meta = artifacts.strict_json(stream.read())["meta"]
            return {**meta["weights"], **meta.get("files", {})}
        except (OSError, ValueError, KeyError, TypeError, ArtifactError):
            return {}

    def _written(self, stage: Stage) -> list[str]:
        """The files that a stage may write, relative to the run directory."""
        return [stage.file, *stage.weights, files.resume_file(stage.name), *stage.also_writes(self.context.inputs)]


def _difference(recorded: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Which parts of a key changed, in words; empty if none."""
    changes = []
    if recorded["version"] != parts["version"]:
        changes.append(f"the stage's version ({recorded['version']} -> {parts['version']})")
    old, new = flat(recorded["settings"]), flat(parts["settings"])
    for key, default in _CHOOSING.items():
        made, asked = (settings.get(key, default) for settings in (old, new))
        if made != asked:  # other rows of the table: nothing else can be compared
            return f"changed: {key} {made} -> {asked}"
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            changes.append(f"{key} {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}")
    for name in sorted(recorded["inputs"].keys() | parts["inputs"].keys()):
        if recorded["inputs"].get(name) != parts["inputs"].get(name):
            changes.append(INPUTS[name].words if name in INPUTS else STAGES[name].file if name in STAGES else name)
    return "changed: " + ", ".join(changes) if changes else ""


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result
