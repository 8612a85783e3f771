"""`megu compare`: one request through many methods and seeds, on the same splits, original, oracle and clock.

Under ``compare/<seed>/`` each method leaves its figures in a file with a key of its own, so a run that was cut short
goes on where it stopped, and another method or seed computes only what is new.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli import __version__, artifacts
from megu_cli.artifacts import Artifact
from megu_cli.baselines import methods
from megu_cli.config import Config, changed, preset_settings
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
_OUR_GRIDS: dict[str, Sequence[Mapping[str, Any]]] = {
    "megu": tuple({"finetune.align": a, "finetune.lr": lr} for a in (0.05, 0.1) for lr in (0.02, 0.1)),
    "megu-paper": tuple({"finetune.weight": w, "finetune.lr": lr} for w in (0.1, 0.25) for lr in (0.01, 0.03)),
}
_SIZES = ("finetune.batch", "finetune.forget_batch", "finetune.retain_fraction")
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

    def plan(self) -> list[tuple[str, str, str]]:
        """(seed and method, run or keep, reason) of each cell, without running any."""
        return [
            (f"{arena.seed}/{name}", *arena.plan(name, self._given(name), self._rival(arena)))
            for arena in self.arenas
            for name in self.names
        ]

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
        trials = {name: self._trials(name, force) for name in self.names if tune and _grid(name)}
        for name, tried in trials.items():
            # The first of equals: a grid begins with its gentlest point.
            winner = max(tried, key=lambda trial: -math.inf if trial["score"] is None else trial["score"])
            settings[name] |= winner["settings"]

        cells: dict[str, dict[str, Row]] = {name: {} for name in self.names}
        contents: dict[str, str] = {}
        failed: dict[str, dict[str, str]] = {}
        for arena in self.arenas:
            for name in self.names:
                try:
                    cell = arena.cell(name, settings[name], self._rival(arena), force)
                except Exception as error:  # one method that fails must not cost the others' results
                    failed.setdefault(name, {})[str(arena.seed)] = self._failure(f"{arena.seed}/{name}", error)
                else:
                    contents[f"{arena.seed}/{name}"] = cell.content
                    cells[name][str(arena.seed)] = {**cell.body, **arena.clock(cell)}
            arena.forget_loaded()

        body = self._body(cells) | {"failed": failed, "tuned": trials}
        parts = {"stage": "compare", "version": _VERSION, "inputs": contents}
        meta = {**parts, "fingerprint": artifacts.digest(parts), "seed": self.base.config.seed, "megu": __version__}
        artifacts.write(self.base.out / FILE, artifacts.seal(Artifact(body), meta))
        return body

    def _failure(self, what: str, error: Exception) -> str:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.say(f"{what}: FAILED: {message}")
        return message

    def _given(self, name: str) -> dict[str, Any]:
        return dict(self.base.config.compare.settings.get(name, {}))

    def _rival(self, arena: Arena) -> Arena | None:
        """The arena whose oracle the arena's own is held against."""
        place = self.arenas.index(arena)
        rival = self.arenas[(place + 1) % len(self.arenas)]
        return rival if rival is not arena else None

    def _trials(self, name: str, force: bool) -> list[dict[str, Any]]:
        """Each point of a method's grid with its score on the first seed; ``None`` where the method failed."""
        trials: list[dict[str, Any]] = []
        for number, point in enumerate(_grid(name)):
            score = None
            try:
                score = self.arenas[0].trial(name, number, {**self._given(name), **point}, force).body["score"]
            except Exception as error:
                self._failure(f"tuning {name} with {dict(point)}", error)
            trials.append({"settings": dict(point), "score": score})
        return trials

    def _body(self, cells: Mapping[str, Mapping[str, Row]]) -> dict[str, Any]:
        from megu_cli.evaluation.distance import noise_floor
        from megu_cli.measuring import described

        rows: dict[str, Any] = {}
        for name, by_seed in cells.items():
            if by_seed:
                figures = [{**c["metrics"], **c["comparison"], **_time(c)} for c in by_seed.values()]
                rows[name] = {
                    "settings": next(iter(by_seed.values()))["settings"],
                    **summary(figures),
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
    """

    def __init__(self, base: Workspace, seed: int, say: Say) -> None:
        self.base, self.seed, self.say = base, seed, say
        self.folder = base.out / FOLDER / str(seed)
        # The config's own seed shares original and oracle with `megu run`.
        own = seed == base.config.seed
        self.work = base if own else base.sibling(self._config({"seed": seed, "out": self.folder}))

    def _config(self, settings: Mapping[str, Any]) -> Config:
        return changed(self.base.config, {"seed": self.seed, **settings})

    @property
    def _goals(self) -> list[str]:
        return ["oracle"] if self.work.own_checkpoint else ["train", "oracle"]

    def prepare(self) -> None:
        """Train the original and the oracle, unless they are there."""
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
        pipeline = Pipeline(self.work)
        for goal in self._goals:
            if pipeline.state(goal).status != "fresh":
                return "run", f"the {'original' if goal == 'train' else goal} is {pipeline.state(goal).status}"
        if name in OURS and not (self.folder / name).exists():
            return "run", "missing"
        if name in OURS:
            ours = self._ours(name, {}, self.folder / name)
            if ours.state("finetune").status != "fresh":
                return "run", f"finetune is {ours.state('finetune').status}"
        if rival and Pipeline(rival.work).state("oracle").status != "fresh":
            return "run", f"the oracle of seed {rival.seed} is missing"
        path = self.folder / f"{name}.json"
        return ("keep", "fresh") if _fresh(path, self._parts(name, given, rival)) else ("run", "missing or changed")

    def cell(self, name: str, given: Mapping[str, Any], rival: Arena | None, force: bool = False) -> Artifact:
        """The figures of one method; computed unless the file fits.

        Args:
            name: Of the method.
            given: Its settings where they differ from the defaults.
            rival: The arena whose oracle judges this one's, for ``retrain``.
            force: Compute it anyway.

        Raises:
            Exception: Whatever the method raises.
        """
        path, key = self.folder / f"{name}.json", f"{self.seed}/{name}"
        if name in OURS:
            self._ours(name, given, self.folder / name).run(force, goals=["finetune"])
        parts = self._parts(name, given, rival)
        if not force and (kept := _fresh(path, parts)):
            self.say(f"{key}: fresh")
            return kept
        self.say(f"{key}: running")
        model, seconds, machine = self._made(name, given, self.work, self.folder / name)
        self._log(parts, seconds, machine)
        return self._keep(path, self._judge(name, model, rival) | {"settings": parts["settings"]["method"]}, parts)

    def trial(self, name: str, number: int, given: Mapping[str, Any], force: bool = False) -> Artifact:
        """The score of one point of a method's grid, from training and validation images alone.

        The score is the accuracy on retained validation images less |accuracy on D_f - target|: target 0 for whole
        classes, and for single images the accuracy on held-out images of the same classes. A sub-class request is
        tuned on forgetting the classes that own the sub-classes.
        """
        folder = self.folder / "tune" / f"{name}-{number}"
        work = self._tuning
        parts = self._parts(name, given, None, work, score=True)
        path = folder.with_suffix(".json")
        path.parent.mkdir(exist_ok=True)
        if not force and (kept := _fresh(path, parts)):
            return kept
        self.say(f"{self.seed}/{name}: tuning with {dict(given)}")
        model, seconds, machine = self._made(name, given, work, folder)
        self._log(parts, seconds, machine)
        return self._keep(path, {"score": score(model, work), "settings": dict(given)}, parts)

    @cached_property
    def _tuning(self) -> Workspace:
        request, data = self.base.request, self.base.data
        if request.kind != "subclasses":
            return self.work
        owners = sorted({data.classes[int(data.concept_class[c])] for c in request.concepts})
        settings = {
            "forget": {"classes": owners, "already": self.base.config.forget.already},
            "out": self.folder / "tune",
            "model.checkpoint": self.work.checkpoint_file,
        }
        return self.base.sibling(self._config(settings), request=False)

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

    def _ours(self, name: str, given: Mapping[str, Any], folder: Path, work: Workspace | None = None) -> Pipeline:
        """MeGU's pipeline from this arena's original, in a folder of its own."""
        work = work or self.work
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
        rival: Arena | None,
        work: Workspace | None = None,
        score: bool = False,
    ) -> dict[str, Any]:
        """The key of a cell."""
        from megu_cli import measuring

        work = work or self.work
        version, own = "1", dict(given)
        settings = {"seed": self.seed, **({} if score else work.settings(measuring.SETTINGS))}
        inputs = {key: work.digest(key) for key in ("train_data", "test_data", "forget")}
        inputs["checkpoint"] = self.work.digest("checkpoint")
        if name == "retrain":
            own = work.config.train.model_dump()
            inputs["rival"] = rival._oracle_content if rival else ""
        elif name in OURS:
            own = {**OURS[name], **own}
            if score:
                settings["method_config"] = {
                    key: work.settings((key,))[key] for key in ("mllm", "transition", "labels", "noise", "finetune")
                }
            else:
                meta = artifacts.read_meta(self.folder / name / STAGES["finetune"].file)
                inputs["finetune"] = str(meta["content"])
        else:
            method = methods()[name]
            own, version = method.settings(given), method.version
            settings |= work.settings(_SIZES)
        if not score:
            inputs["oracle"] = self._oracle_content
        return {
            "stage": f"{'tune' if score else 'compare'} {name}",
            "version": [_VERSION, measuring.VERSION, version],
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

    data, request = work.data, work.request
    if not len(request.validation):
        raise ConfigError("--tune selects on held-out images, and there are none", "Raise data.validation.")
    forgotten = accuracy(model, data.train, request.forget, work.device)
    target = 0.0
    if not request.classes:
        same = data.validation & torch.isin(data.train.labels, data.train.labels[request.forget].unique())
        target = accuracy(model, data.train, torch.where(same)[0], work.device)
    return accuracy(model, data.train, request.validation, work.device) - abs(forgotten - target)


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean, and half-width of its 95% interval (Student's t), of every figure over seeds.

    ``None`` where a seed has no such figure; the interval needs two seeds.
    """
    from scipy import stats

    mean: dict[str, float | None] = {}
    interval: dict[str, float | None] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [value for row in rows if (value := row.get(name)) is not None]
        n = len(values)
        complete = n == len(rows)
        mean[name] = sum(values) / n if complete else None
        interval[name] = None
        if complete and n > 1:
            spread = math.sqrt(sum((v - sum(values) / n) ** 2 for v in values) / (n - 1))
            interval[name] = float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return {"mean": mean, "interval": interval}


def _time(cell: Row) -> dict[str, float | None]:
    return {"seconds": cell["seconds"], "time_ratio": cell["time_ratio"]}


def _grid(name: str) -> Sequence[Mapping[str, Any]]:
    return _OUR_GRIDS[name] if name in OURS else methods()[name].grid


def _fresh(path: Path, parts: Mapping[str, Any]) -> Artifact | None:
    """The artifact at ``path``, if it is whole and has this key."""
    try:
        found = artifacts.read(path)
    except ArtifactError:
        return None
    return found if found.meta.get("fingerprint") == artifacts.digest(parts) else None


def best(rows: Mapping[str, Mapping[str, Any]], figure: str, excluded: Iterable[str] = ()) -> str | None:
    """The method that is nearest to the figure's target: the oracle's mean, 0, or 1; ``None`` if none has it."""
    excluded = set(excluded)
    values = {
        name: row["mean"][figure]
        for name, row in rows.items()
        if name not in excluded and row["mean"].get(figure) is not None
    }
    fixed = {"agreement": 1.0, "tow": 1.0, "mia_loss_auc": 0.5, "mia_loss_tpr_at_1fpr": 0.01}
    zero = ("avg_gap", "js_divergence", "activation_distance", "seconds", "time_ratio")
    target = fixed.get(figure, 0.0 if figure in zero else rows.get("retrain", {}).get("mean", {}).get(figure))
    if target is None or not values:
        return None
    return min(values, key=lambda name: abs(values[name] - target))
