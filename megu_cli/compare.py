"""`megu compare`: one request through many methods and seeds, on the same splits, original, oracle and clock.

Under ``compare/<seed>/`` each method leaves its figures in a file with a key of its own, so a run that was cut short
goes on where it stopped, and another method or seed computes only what is new.
"""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli import __version__, artifacts, ownership, writing
from megu_cli.artifacts import Artifact
from megu_cli.baselines import methods
from megu_cli.config import changed, preset_settings
from megu_cli.errors import ArtifactError, ConfigError, MeguError
from megu_cli.pipeline import STAGES, Pipeline
from megu_cli.workspace import Workspace

if TYPE_CHECKING:
    from torch import nn

    from megu_cli.measuring import Figures, Seen

FILE = "compare.json"
FOLDER = "compare"
# MeGU runs through its own stages: its settings are the config's.
OURS: dict[str, dict[str, Any]] = {"megu": {}, "megu-paper": preset_settings("paper")}
# What the paired differences are of, and the target: the oracle's own figure (None), 0 or 1.
_PAIRED: dict[str, float | None] = {
    "avg_gap": 0.0,
    "js_divergence": 0.0,
    "activation_distance": 0.0,
    "agreement": 1.0,
    "retain_test_acc": None,
    "forget_train_acc": None,
    "forget_test_acc": None,
    "mia_entropy_lr": None,
    "mia_loss_auc": None,
    "probe_acc": None,
    "relearn_epochs": None,
    "time_ratio": 0.0,
}
_VERSION = 1

Say = Callable[[str], None]
Row = dict[str, Any]


def chosen(names: Sequence[str] | None) -> list[str]:
    """The names of the methods to run, all of them for ``None``.

    Raises:
        ConfigError: There is no such method.
    """
    known = ["original", "retrain", *OURS, *(name for name in methods() if name not in ("original", "retrain"))]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ConfigError(f"there is no method {', '.join(unknown)}", f"Known: {', '.join(known)}.")
    return known if names is None else list(dict.fromkeys(names))


class Comparison:
    """One request, several methods and seeds.

    Args:
        base: The config's workspace; its run directory holds all results.
        say: Told in a line what is computed, kept and failed.

    Raises:
        ConfigError: A method or one of its settings does not exist.
    """

    def __init__(self, base: Workspace, say: Say = lambda line: None) -> None:
        self.base, self.say = base, say
        settings = base.config.compare
        self.names = chosen(settings.methods)
        for name, given in settings.settings.items():
            if name in OURS or name == "retrain":
                raise ConfigError(f"compare.settings: {name} takes its settings from the rest of the config")
            chosen([name])
            methods()[name].settings(given)
        self.arenas = [Arena(base, base.config.seed + i, say) for i in range(settings.seeds)]

    @cached_property
    def tuning(self) -> Arena:
        """Where settings are chosen: the first seed's arena, unless the config gives a seed or a size for it."""
        settings = self.base.config.compare
        if settings.tune_seed is None and settings.tune_limit is None:
            return self.arenas[0]
        seed = self.base.config.seed if settings.tune_seed is None else settings.tune_seed
        return Arena(self.base, seed, self.say, apart=True)

    def refuse_foreign(self, tune: bool = False, force: bool = False) -> None:
        """See that nothing is replaced but what megu wrote.

        Raises:
            ForeignFileError: A file that megu did not write stands where a result would.
        """
        Pipeline(self.base).refuse_foreign(["similarity", "transition"])
        for name in (FILE, self.base.log.file.name):
            ownership.refuse_foreign(self.base.out, name)
        for arena in dict.fromkeys([*self.arenas, *([self.tuning] if tune else [])]):
            arena.refuse_foreign(self.names, force)

    def plan(self, tune: bool = False) -> list[tuple[str, str, str]]:
        """(seed and method, run or keep, reason) of each cell, without running any.

        Args:
            tune: With the cells that settings are chosen by; those of a method whose choice is still to be made run.
        """
        rows: list[tuple[str, str, str]] = []
        settings: dict[str, dict[str, Any] | None] = {name: self._given(name) for name in self.names}
        for name in self.names if tune else ():
            trials = []
            for number, point in enumerate(self._points(name)):
                action, reason, score = self.tuning.plan_trial(name, number, {**self._given(name), **point})
                rows.append((f"tune {name} {_told(point)}", action, reason))
                trials.append({"settings": dict(point), "score": score})
            if trials:
                known = all(row[1] == "keep" for row in rows[-len(trials) :])
                settings[name] = {**self._given(name), **_winner(trials)} if known else None
        for arena in self.arenas:
            for name, chosen in settings.items():
                untuned = ("run", "its settings are still to be chosen")
                found = untuned if chosen is None else arena.plan(name, chosen, self._rival(arena))
                rows.append((f"{arena.seed}/{name}", *found))
        return rows

    def run(self, tune: bool = False, force: bool = False) -> dict[str, Any]:
        """Compute what is missing and write compare.json.

        Args:
            tune: Choose each method's settings from its grid first.
            force: Compute every cell again.

        Returns:
            The body of compare.json.
        """
        Pipeline(self.base, self.say).preflight()
        if set(OURS) & set(self.names):
            # All seeds share these ratings. First, since they may fail for reasons outside.
            Pipeline(self.base, self.say).run(goals=["transition"])
        for arena in self.arenas:
            arena.prepare()
        settings = {name: self._given(name) for name in self.names}
        trials: dict[str, list[dict[str, Any]]] = {}
        if tune:
            self.tuning.prepare()
            trials = {name: self._trials(name, force) for name in self.names if self._points(name)}
            self.tuning.forget_loaded()
        failed: dict[str, dict[str, str]] = {}
        for name, tried in trials.items():
            try:
                settings[name] |= _winner(tried)
            except MeguError as error:
                failed[name] = {str(arena.seed): error.message for arena in self.arenas}
        untuned = set(failed)

        cells: dict[str, dict[str, Row]] = {name: {} for name in self.names}
        contents: dict[str, str] = {}
        for arena in self.arenas:
            for name in (name for name in self.names if name not in untuned):
                try:
                    cell = arena.cell(name, settings[name], self._rival(arena), force)
                except Exception as error:  # one method that fails must not cost the others' results
                    failed.setdefault(name, {})[str(arena.seed)] = self._failure(f"{arena.seed}/{name}", error)
                else:
                    contents[f"{arena.seed}/{name}"] = cell.content
                    cells[name][str(arena.seed)] = {**cell.body, **arena.clock(cell)}
            arena.forget_loaded()

        body = self._body(cells) | {"failed": failed, "tuned": trials}
        if tune:
            body["tuning"] = {"seed": self.tuning.seed, "images": len(self.tuning.work.data.train)}
        parts = {"stage": "compare", "version": _VERSION, "inputs": contents}
        meta = {**parts, "fingerprint": artifacts.digest(parts), "seed": self.base.config.seed, "megu": __version__}
        artifacts.write(self.base.out / FILE, artifacts.seal(Artifact(body), meta))
        return body

    def _failure(self, what: str, error: Exception) -> str:
        """What is said of a method that failed; the traceback of a fault of its own goes to a file."""
        if isinstance(error, MeguError):
            message = error.message
        else:
            name = re.sub(r"[^\w.=]+", "-", what)
            log = f"{FOLDER}/{name}.error.txt"
            ownership.refuse_foreign(self.base.out, log)
            (self.base.out / FOLDER).mkdir(exist_ok=True)
            with writing.replacing(self.base.out / log) as temporary:
                temporary.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            message = f"{type(error).__name__}: {error}".splitlines()[0] + f" ({log})"
        self.say(f"{what}: FAILED: {message}")
        return message

    def _given(self, name: str) -> dict[str, Any]:
        return dict(self.base.config.compare.settings.get(name, {}))

    def _points(self, name: str) -> list[dict[str, Any]]:
        """The points that are tried for a method; what the config gives it is not varied."""
        given = self._given(name)
        points = [{k: v for k, v in point.items() if k not in given} for point in _grid(name, self.base.request.kind)]
        return [point for place, point in enumerate(points) if point and point not in points[:place]]

    def _rival(self, arena: Arena) -> Arena | None:
        """The arena whose oracle the arena's own is held against."""
        place = self.arenas.index(arena)
        rival = self.arenas[(place + 1) % len(self.arenas)]
        return rival if rival is not arena else None

    def _trials(self, name: str, force: bool) -> list[dict[str, Any]]:
        """Each point of a method's grid with its score; ``None`` where the method failed."""
        trials: list[dict[str, Any]] = []
        for number, point in enumerate(self._points(name)):
            score = None
            try:
                score = self.tuning.trial(name, number, {**self._given(name), **point}, force).body["score"]
            except Exception as error:
                self._failure(f"tuning {name} with {_told(point)}", error)
            trials.append({"settings": dict(point), "score": score})
        return trials

    def _body(self, cells: Mapping[str, Mapping[str, Row]]) -> dict[str, Any]:
        from megu_cli.evaluation.distance import noise_floor
        from megu_cli.measuring import described

        oracles = {seed: cell["metrics"] for seed, cell in cells.get("retrain", {}).items()}
        apart = {
            name: {seed: distances(figures(cell), oracles.get(seed, {})) for seed, cell in by_seed.items()}
            for name, by_seed in cells.items()
        }
        rows: dict[str, Any] = {}
        for name, by_seed in cells.items():
            if by_seed:
                rows[name] = {
                    "settings": next(iter(by_seed.values()))["settings"],
                    **summary([figures(cell) for cell in by_seed.values()]),
                    # Of retraining there is nothing to say: it is the target.
                    "paired": {} if name in ("megu", "retrain") else paired(apart[name], apart.get("megu", {})),
                    "seeds": by_seed,
                }
        return {
            "request": described(self.base),
            "seeds": [arena.seed for arena in self.arenas],
            "methods": rows,
            "noise_floor": noise_floor([cell["metrics"] for cell in cells.get("retrain", {}).values()]),
        }


class Arena:
    """Where methods meet for one seed: one original, one oracle.

    Args:
        base: The config's workspace.
        seed: Of the original, the oracle and the methods; the request is the config's for every seed.
        say: Told what is done.
        apart: Settings are chosen here and nothing is judged, so there is no oracle; request and original are drawn
            for this seed, on as many images as ``compare.tune_limit`` says.

    Raises:
        ConfigError: The original cannot be trained on fewer images.
    """

    def __init__(self, base: Workspace, seed: int, say: Say, apart: bool = False) -> None:
        self.base, self.seed, self.say, self.apart = base, seed, say, apart
        self.folder = base.out / FOLDER / (f"tune-{seed}" if apart else str(seed))
        if apart:
            self.work = self._smaller()
        elif seed == base.config.seed:
            self.work = base  # shares original and oracle with `megu run`
        else:
            self.work = base.sibling(changed(base.config, {"seed": seed, "out": self.folder}))

    def _smaller(self) -> Workspace:
        config, request = self.base.config, self.base.request
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
                "subclasses": {"subclasses": [self.base.data.concepts[c] for c in request.asked]},
            }.get(request.kind, {"random": {"fraction": share}})
            settings["forget"] = {**named, **self._before}
        work = self.base.sibling(changed(config, settings), request=False, data=limit == config.data.limit)
        if config.compare.tune_limit is not None and work.own_checkpoint:
            raise ConfigError(
                f"compare.tune_limit: {work.own_checkpoint} holds weights, and they have seen all images",
                "Leave compare.tune_limit out, or name a directory without weights in model.name.",
            )
        return work

    @property
    def _goals(self) -> list[str]:
        goals = ["train"] if self.apart else ["train", "oracle"]
        return goals[1:] if self.work.own_checkpoint else goals

    def refuse_foreign(self, names: Sequence[str], force: bool) -> None:
        """See that the files of these methods, where they are there, were written by megu.

        Raises:
            ForeignFileError: One was not.
        """
        Pipeline(self.work).refuse_foreign(self._goals)
        for name in names:
            folder = self.folder / name
            ownership.refuse_foreign(self.base.out, _file(folder).relative_to(self.base.out).as_posix())
            if name in OURS and folder.exists():
                ours = self._ours(name, {}, folder, self.work)
                ours.refuse_foreign(ours._all_upstream(["finetune"]), force)

    def prepare(self) -> None:
        """Train the original and, where anything is judged, the oracle, unless they are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        Pipeline(self.work, lambda line: self.say(f"{self.seed}/{line}")).run(goals=self._goals)

    # -- loaded when the first cell needs them ---------------------------------------------------------------------

    @cached_property
    def _oracle(self) -> Artifact:
        return artifacts.read(self.work.out / STAGES["oracle"].file)

    def oracle_model(self) -> nn.Module:
        """The oracle, in eval mode."""
        return self.work.load(self._oracle.tensors, STAGES["oracle"].file)

    @cached_property
    def oracle_seen(self) -> Seen:
        """What the oracle says."""
        from megu_cli.measuring import Seen

        return Seen.by(self.oracle_model(), self.work, "oracle")

    @cached_property
    def oracle_figures(self) -> Figures:
        """The metrics of the oracle."""
        from megu_cli import measuring

        return measuring.metrics(self.oracle_seen, self.work, measuring.ignorant(self.work))

    @cached_property
    def original_seen(self) -> Seen:
        """What the original says."""
        from megu_cli.measuring import Seen

        return Seen.by(self.work.original(), self.work, "original")

    def forget_loaded(self) -> None:
        """Free what only cells that are yet to be computed need."""
        for name in ("_oracle", "oracle_seen", "oracle_figures", "original_seen"):
            self.__dict__.pop(name, None)

    # -- cells -----------------------------------------------------------------------------------------------------

    def plan(self, name: str, given: Mapping[str, Any], rival: Arena | None) -> tuple[str, str]:
        """Whether a cell would be kept or run, and why."""
        if name == "retrain" and rival and (missing := rival._unprepared()):
            return "run", f"seed {rival.seed}: {missing}"
        action, reason, _ = self._planned(name, given, self.folder / name, self.work, rival)
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
        work: Workspace,
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
            label: Of its files; a method with several settings needs several. ``None``: its name.

        Raises:
            Exception: Whatever the method raises.
        """
        folder, key = self.folder / (label or name), f"{self.seed}/{label or name}"
        if name in OURS:
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
        self.say(f"{self.seed}/{name}: tuning with {_told(given)}")
        model, seconds, machine = self._made(name, given, work, folder)
        self._log(parts, seconds, machine)
        return self._keep(_file(folder), {"score": score(model, work), "settings": dict(given)}, parts)

    def _trial(self, name: str, number: int) -> Path:
        return self.folder / "tune" / f"{name}-{number}"

    @cached_property
    def _tuning(self) -> Workspace:
        config = self.work.config
        if self.work.request.kind != "subclasses":
            return self.work
        settings = {
            "seed": self.seed,
            "forget": {"classes": self._owners, **self._before},
            "out": self.folder / "tune",
            "model.checkpoint": self.work.checkpoint_file,
        }
        return self.work.sibling(changed(config, settings), request=False)

    @property
    def _before(self) -> dict[str, Any]:
        """What the config says of earlier requests."""
        return self.base.config.forget.model_dump(include={"already", "already_missing"})

    @property
    def _owners(self) -> list[str]:
        """The classes of what is asked for."""
        data, request = self.base.data, self.base.request
        return sorted({data.classes[int(data.concept_class[c])] for c in request.asked})

    def _made(
        self, name: str, given: Mapping[str, Any], work: Workspace, folder: Path
    ) -> tuple[nn.Module, float | None, str]:
        """The model that a method makes, the seconds it took, and where."""
        from megu_cli.runtime import machine

        if name == "retrain":
            known = Pipeline(self.work).seconds("oracle")
            return self.oracle_model(), *(known or (None, ""))
        if name in OURS:
            ours = self._ours(name, given, folder, work)
            ours.run(goals=["finetune"])
            return ours.work.unlearned(), *(ours.method_seconds() or (None, ""))
        from megu_cli.stages import task

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

    def _ours(self, name: str, given: Mapping[str, Any], folder: Path, work: Workspace) -> Pipeline:
        """MeGU's pipeline from this arena's original, in a folder of its own."""
        settings = {**OURS[name], **given, "out": folder, "model.checkpoint": self.work.checkpoint_file}
        config = changed(work.config, {"seed": self.seed, **settings})
        folder.mkdir(parents=True, exist_ok=True)
        return Pipeline(work.sibling(config))

    def _judge(self, name: str, model: nn.Module, rival: Arena | None) -> Row:
        """All figures of a model; the oracle itself is judged by the oracle of the next seed."""
        from megu_cli import measuring

        work = self.work
        seen = self.oracle_seen if name == "retrain" else measuring.Seen.by(model, work, name)
        own = self.oracle_figures if name == "retrain" else measuring.metrics(seen, work, measuring.ignorant(work))
        judge = rival if name == "retrain" else self
        row: Row = {
            "metrics": own,
            "comparison": measuring.compared(seen, own, judge.oracle_seen, judge.oracle_figures, work) if judge else {},
            "entanglement": measuring.entangled(seen, self.original_seen, work),
            "per_class": measuring.per_class({name: seen}, [name], work)[name],
        }
        target = self.original_seen.train.predicted[work.request.forget] == work.data.train.labels[work.request.forget]
        for epochs in measuring.relearned({name: model}, target.double().mean().item(), work).values():
            row["metrics"]["relearn_epochs"] = epochs
        return row

    def _parts(
        self,
        name: str,
        given: Mapping[str, Any],
        folder: Path,
        work: Workspace,
        rival: Arena | None = None,
        score: bool = False,
    ) -> dict[str, Any]:
        """The key of a cell or of a score."""
        from megu_cli.stages import task

        version, own = "1", dict(given)
        judging = STAGES["eval"]
        settings = {"seed": self.seed, **work.settings(("model.name",) if score else judging.settings)}
        inputs = {key: work.digest(key) for key in ("train_data", "test_data", "forget")}
        inputs["checkpoint"] = self.work.digest("checkpoint")
        if name == "retrain":
            own = work.config.train.model_dump()
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
            "version": [_VERSION, judging.version, version],
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
            self.base.log.append({**entry, "machine": machine})

    def clock(self, cell: Artifact) -> Row:
        """Seconds of a cell, and as a share of retraining where both were measured on one machine."""
        own = self.base.log.seconds(cell.meta["fingerprint"])
        oracle = Pipeline(self.work).seconds("oracle")
        same = own and oracle and own[1] == oracle[1] and oracle[0]
        return {
            "seconds": own[0] if own else None,
            "time_ratio": own[0] / oracle[0] if own and oracle and same else None,
        }


def score(model: nn.Module, work: Workspace) -> float:
    """What tuning maximises; see `Arena.trial`.

    Raises:
        ConfigError: There are no held-out images.
    """
    import torch

    from megu_cli.training import accuracy

    data, request, size = work.data, work.request, work.eval_batch
    if not len(request.validation):
        raise ConfigError("--tune selects on held-out images, and there are none", "Raise data.validation.")
    forgotten = accuracy(model, data.train, request.forget, work.device, batch=size)
    target = 0.0
    labels = data.train.labels[request.forget]
    staying = labels[~torch.isin(labels, torch.tensor(request.classes, dtype=torch.int64))]
    if len(staying):  # of a class that is wholly forgotten nothing is right
        held_out = request.held_out(data)
        same = held_out[torch.isin(data.train.labels[held_out], staying)]
        same = same if len(same) else request.validation
        target = accuracy(model, data.train, same, work.device, batch=size) * len(staying) / len(labels)
    return accuracy(model, data.train, request.validation, work.device, batch=size) - abs(forgotten - target)


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean, and half-width of its 95% interval (Student's t), of every figure over seeds.

    ``None`` where a seed has no such figure; the interval needs two seeds.
    """
    mean: dict[str, float | None] = {}
    interval: dict[str, float | None] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [value for row in rows if (value := row.get(name)) is not None]
        complete = len(values) == len(rows)
        mean[name], interval[name] = _interval(values) if complete else (None, None)
    return {"mean": mean, "interval": interval}


def _interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half-width of its 95% interval by Student's t; ``None`` for a single value."""
    from scipy import stats

    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, None
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)


def distances(own: Mapping[str, float | None], oracle: Mapping[str, float | None]) -> dict[str, float]:
    """How far the main figures of a method are from their targets: the oracle's of the same seed, 0 or 1.

    Args:
        own: The method's figures.
        oracle: The oracle's; empty where it is not known.

    Returns:
        Figure -> |own - target|, of those that both have.
    """
    pairs = {name: (own.get(name), oracle.get(name) if target is None else target) for name, target in _PAIRED.items()}
    return {name: abs(x - target) for name, (x, target) in pairs.items() if x is not None and target is not None}


def paired(
    other: Mapping[str, Mapping[str, float]], ours: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float | int | None]]:
    """How much farther from the target a method is than ours, seed by seed; above 0: ours is nearer.

    Better or worse is what has an interval without 0: the paired t-test at 5%.

    Args:
        other: Seed -> `distances` of the method.
        ours: The same of ours.

    Returns:
        Figure -> ``mean`` of the differences, half-width of its 95% ``interval`` by Student's t (``None`` for a single
        seed), and the number of ``seeds`` that have both.
    """
    result: dict[str, dict[str, float | int | None]] = {}
    for name in _PAIRED:
        seeds = [seed for seed in other if name in other[seed] and name in ours.get(seed, {})]
        if seeds:
            mean, interval = _interval([other[seed][name] - ours[seed][name] for seed in seeds])
            result[name] = {"mean": mean, "interval": interval, "seeds": len(seeds)}
    return result


def nearest(rows: Mapping[str, Row], figure: str, excluded: Iterable[str] = ()) -> str | None:
    """The method whose figure is nearest to its target, in the mean over all seeds; ``None`` if none has it.

    Args:
        rows: Name -> row of compare.json.
        figure: One of those that `distances` gives.
        excluded: Names of methods that cannot be it.
    """
    oracles = {seed: figures(cell) for seed, cell in rows.get("retrain", {}).get("seeds", {}).items()}
    complete = max((len(row["seeds"]) for row in rows.values()), default=0)
    apart = {}
    for name, row in rows.items():
        found = [distances(figures(cell), oracles.get(seed, {})).get(figure) for seed, cell in row["seeds"].items()]
        known = [distance for distance in found if distance is not None]
        if name not in {*excluded} and known and len(known) == complete:
            apart[name] = sum(known) / complete
    return min(apart, key=lambda name: apart[name]) if apart else None


def figures(cell: Row) -> dict[str, float | None]:
    """All figures of a method with one seed, as compare.json has them."""
    time = {"seconds": cell["seconds"], "time_ratio": cell["time_ratio"]}
    return {**cell["metrics"], **cell["comparison"], **cell["entanglement"], **time}


def _grid(name: str, kind: str) -> Sequence[Mapping[str, Any]]:
    """The settings that are tried for a method and a kind of request; see `megu_cli.forget.Kind`."""
    if name in OURS:
        # The score sees no features, so the adversary is not among them.
        weights = ("auto", 0.4)
        return [{"finetune.weight": weight, "finetune.lr": lr} for weight in weights for lr in (0.02, 0.05)]
    return methods()[name].grid


def _winner(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings with the best score; the first of equals, since a grid begins with its gentlest point.

    Raises:
        MeguError: The method failed with all of them.
    """
    if all(trial["score"] is None for trial in trials):
        raise MeguError("it failed with every setting that was tried", "What it said stands above.")
    best = max(trials, key=lambda trial: -math.inf if trial["score"] is None else trial["score"])
    return dict(best["settings"])


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


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
