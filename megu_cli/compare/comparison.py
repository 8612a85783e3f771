"""`megu compare`: one request through many methods and seeds, on the same splits, original, oracle and clock.

Under ``compare/<seed>/`` each method leaves its figures in a file with a key of its own, so a run that was cut short
goes on where it stopped, and another method or seed computes only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

from megu_cli.baselines import methods
from megu_cli.compare import tuning
from megu_cli.compare.arena import CONFIDENCES, VERSION, Arena, Say, keep
from megu_cli.compare.cells import Cell, Cells
from megu_cli.compare.equivalence import equivalences
from megu_cli.compare.jobs import Jobs, Opened, Workers
from megu_cli.compare.methods import OURS, Contender, chosen, variants
from megu_cli.compare.statistics import Row, against_oracle, distances, figures, paired, summary
from megu_cli.config import Config, changed
from megu_cli.errors import ConfigError, brief
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.run import files, ownership
from megu_cli.run.artifacts import Artifact

# Cells, how another process opens them, the line of what is done, whether to compute again what is there -> workers.
Hire = Callable[[Cells, Opened, Say, bool], Workers]


class Comparison:
    """One request, several methods and seeds.

    Args:
        base: The config's run; its run directory holds all results.
        say: Told in a line what is computed, kept and failed.

    Raises:
        ConfigError: A method or one of its settings does not exist.
    """

    def __init__(self, base: RunContext, say: Say = lambda line: None) -> None:
        self.base, self._say, self._computed = base, say, False
        settings = base.config.compare
        self.names = chosen(settings.methods, rated=base.config.knows_near)
        for name, given in settings.settings.items():
            if name in OURS or name == "retrain":
                raise ConfigError(f"compare.settings: {name} takes its settings from the rest of the config")
            chosen([name])
            methods()[name].settings(given)
        self.variants = variants(base.config)
        # Name -> method; the variants stand below the methods.
        self.rows = {
            **{name: name for name in self.names},
            **{name: variant.method for name, variant in self.variants.items()},
        }
        self.arenas = [Arena(base, base.config.seed + i, self.say) for i in range(settings.seeds)]

    def say(self, line: str) -> None:
        """Tell what is done; after other processes have computed the cells, not that each is there."""
        if not (self._computed and line.endswith(": fresh")):
            self._say(line)

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
        if self.base.config.takes_ratings:
            Pipeline(self.base).refuse_foreign(["similarity", "transition"])
        for name in (files.COMPARISON, self.base.directory.log.file.name):
            ownership.refuse_foreign(self.base.directory.out, name)
        for arena in dict.fromkeys([*self.arenas, *([self.tuning] if tune else [])]):
            rows = [Contender(name, name, {}) for name in self.names]
            arena.refuse_foreign([*rows, *([] if arena.apart else self.variants.values())], force)

    def plan(self, tune: bool = False) -> list[tuple[str, str, str]]:
        """(seed and method, run or keep, reason) of each cell, without running any.

        Args:
            tune: With the cells that settings are chosen by; those of a method whose choice is still to be made run.
        """
        rows: list[tuple[str, str, str]] = []
        tried: dict[str, list[dict[str, Any]] | None] = {}
        for name in self.names if tune else ():
            trials = []
            for number, point in enumerate(self._points(name)):
                action, reason, score = self.tuning.plan_trial(name, number, {**self._given(name), **point})
                rows.append((f"tune {name} {tuning.described(point)}", action, reason))
                trials.append({"settings": dict(point), "score": score})
            tried[name] = None if any(trial["score"] is None for trial in trials) else trials
        for arena in self.arenas:
            for label, method in self.rows.items():
                settings = self._settings(label, tried)
                found = ("run", "its settings are still to be chosen")
                if settings is not None:
                    found = arena.plan(Contender(label, method, settings), self._rival(arena))
                rows.append((f"{arena.name}/{label}", *found))
        return rows

    def cells(self, tune: bool = False) -> Cells:
        """Return the cells of this comparison, which processes may compute side by side.

        Args:
            tune: Include the cells that settings are chosen by.
        """
        cells = Cells(self.base.directory.out, self.say)
        ratings: tuple[str, ...] = ()
        if self._rated:
            # All seeds share these ratings. First, since they may fail for reasons outside.
            ratings = (cells.add(Cell("ratings", self._rate, common=True)),)
        start: dict[Arena, tuple[str, ...]] = {}
        for arena in dict.fromkeys([*self.arenas, *([self.tuning] if tune else [])]):
            goals = {f"{arena.name}/{goal}": partial(arena.prepare, [goal]) for goal in arena.goals}
            start[arena] = tuple(cells.add(Cell(id, _done(goal), common=True)) for id, goal in goals.items())
        for name in self.names if tune else ():
            needs = (*(ratings if name in OURS else ()), *start[self.tuning])
            for number, point in enumerate(self._points(name)):
                trial = partial(self.tuning.trial, name, number, {**self._given(name), **point})
                cells.add(Cell(self._trial_id(name, number), trial, needs, self.tuning))
        for arena in self.arenas:
            for label, method in self.rows.items():
                needs = (*(ratings if method in OURS else ()), *start[arena])
                if method == "retrain" and (rival := self._rival(arena)):
                    needs += start[rival]
                if tune and method in self.names:
                    needs += tuple(self._trial_id(method, number) for number in range(len(self._points(method))))
                if label in self.variants and method in self.names:
                    needs += (f"{arena.name}/{method}",)
                cells.add(Cell(f"{arena.name}/{label}", partial(self._cell, cells, arena, label, tune), needs, arena))
        return cells

    def preflight(self) -> None:
        """Set up this process for computing, and see that a checkpoint of the user's classifies the data."""
        self.base.runtime.start()
        Pipeline(self.base, self.say).preflight()

    def run_cell(self, name: str, tune: bool = False, force: bool = False) -> None:
        """Compute one cell, and what it needs that is not there.

        Raises:
            ConfigError: There is no such cell.
            MeguError: The cell failed; its exit code is that of the cell's own error.
        """
        cells = self.cells(tune)
        if name not in cells:
            raise ConfigError(
                f"--cell: there is no cell {brief(name)}",
                "Name one that `megu compare --list-cells` prints with the same config and options.",
            )
        self.preflight()
        try:
            cells.compute(name, force)
        except Exception as error:
            raise cells.named(name, error) from error

    def run(self, tune: bool = False, force: bool = False, workers: Hire | None = None) -> dict[str, Any]:
        """Compute what is missing and write compare.json.

        Args:
            tune: Choose each method's settings from its grid first.
            force: Compute every cell again.
            workers: Makes the workers that compute cells side by side, such as `LocalWorkers`; ``None``: this process.

        Returns:
            The body of compare.json.
        """
        from megu_cli.evaluation.ulira import attacks

        cells = self.cells(tune)
        crew = workers(cells, partial(_opened, self.base.config, tune), self._say, force) if workers else None
        self.preflight()
        if crew:
            self.base.directory.keep_digests()  # the other processes need not read the data for them
            Jobs(cells, crew, self._say).run(self.base.runtime.track)
            self._computed, force = True, False
        for name in cells:
            cells.result(name, force)

        failed: dict[str, dict[str, str]] = {}
        rows: dict[str, dict[str, Row]] = {label: {} for label in self.rows}
        confidences: dict[str, dict[str, list[float]]] = {label: {} for label in self.rows}
        contents: dict[str, str] = {}
        for arena in self.arenas:
            for label in self.rows:
                name, seed = f"{arena.name}/{label}", str(arena.seed)
                if (cell := cells.result(name)) is None:
                    failed.setdefault(label, {})[seed] = cells.failures[name]
                    continue
                contents[name] = cell.content
                rows[label][seed] = {**cell.body, **arena.clock(cell)}
                if values := rows[label][seed].pop(CONFIDENCES, None):  # cells of earlier versions have none
                    confidences[label][seed] = values

        body = self._body(rows) | {"failed": failed, "tuned": {}, "ulira": attacks(confidences, "retrain")}
        if tune:
            body["tuned"] = {name: trials for name in self.names if (trials := self._trials(cells, name))}
            body["tuning"] = {"seed": self.tuning.seed, "images": len(self.tuning.context.inputs.data.train)}
        parts = {"stage": "compare", "version": VERSION, "inputs": contents}
        keep(self.base.directory.out / files.COMPARISON, body, parts, self.base.config.seed)
        return body

    def _given(self, name: str) -> dict[str, Any]:
        return dict(self.base.config.compare.settings.get(name, {}))

    def _settings(self, label: str, tried: Mapping[str, list[dict[str, Any]] | None]) -> dict[str, Any] | None:
        """Return the settings of a row; a variant has its method's, but for those that it changes.

        Args:
            label: The row.
            tried: Method -> the points of its grid with their scores, ``None`` if some are still to be computed.
        """
        if label in self.variants:
            variant = self.variants[label]
            settings = self._settings(variant.method, tried)
            return None if settings is None else {**settings, **variant.settings}
        trials = tried.get(label, [])
        return None if trials is None else {**self._given(label), **(tuning.winner(trials) if trials else {})}

    def _points(self, name: str) -> list[dict[str, Any]]:
        """The points that are tried for a method; what the config gives it is not varied."""
        given = self._given(name)
        points = [
            {k: v for k, v in point.items() if k not in given}
            for point in tuning.grid(name, self.base.inputs.request.kind)
        ]
        return [point for place, point in enumerate(points) if point and point not in points[:place]]

    def _rival(self, arena: Arena) -> Arena | None:
        """The arena whose oracle the arena's own is held against."""
        place = self.arenas.index(arena)
        rival = self.arenas[(place + 1) % len(self.arenas)]
        return rival if rival is not arena else None

    def _trial_id(self, name: str, number: int) -> str:
        return f"{self.tuning.name}/tune/{name}-{number}"

    def _trials(self, cells: Cells, name: str) -> list[dict[str, Any]]:
        """Each point of a method's grid with its score; ``None`` where the method failed."""
        trials = [cells.result(self._trial_id(name, number)) for number in range(len(self._points(name)))]
        return [
            {"settings": dict(point), "score": trial.body["score"] if trial else None}
            for point, trial in zip(self._points(name), trials, strict=True)
        ]

    @cached_property
    def _rated(self) -> list[Config]:
        """Configs of the rows that take ratings, one for each rater and question."""
        configs: list[Config] = []
        for label, method in self.rows.items():
            if method in OURS:
                own = self.variants[label].settings if label in self.variants else {}
                config = changed(self.base.config, {**OURS[method], **own})
                if config.takes_ratings and config.mllm not in [known.mllm for known in configs]:
                    configs.append(config)
        return configs

    def _rate(self, force: bool) -> None:
        for config in self._rated:
            if config.mllm == self.base.config.mllm and self.base.config.takes_ratings:
                Pipeline(self.base, self.say).run(goals=["transition"])
            elif config.mllm.rater.asks:  # the rows find the answers
                inputs = self.base.sibling(config).inputs
                inputs.rater.rate(inputs.asked)
                inputs.free_rater()

    def _cell(self, cells: Cells, arena: Arena, label: str, tune: bool, force: bool) -> Artifact:
        """Return the figures of a row for one seed."""
        method = self.rows[label]
        tried = {method: self._trials(cells, method)} if tune and method in self.names else {}
        settings = self._settings(label, tried)
        assert settings is not None
        return arena.cell(Contender(label, method, settings), self._rival(arena), force)

    def _body(self, cells: Mapping[str, Mapping[str, Row]]) -> dict[str, Any]:
        from megu_cli.evaluation.distance import noise_floor
        from megu_cli.evaluation.measure import described

        oracles = {seed: cell["metrics"] for seed, cell in cells.get("retrain", {}).items()}
        apart = {
            name: {seed: distances(figures(cell), oracles.get(seed, {})) for seed, cell in by_seed.items()}
            for name, by_seed in cells.items()
        }
        margins, differences = against_oracle(cells)
        verdicts = equivalences(differences, margins)
        rows: dict[str, Any] = {}
        for name, by_seed in cells.items():
            if by_seed:
                rows[name] = {
                    "settings": next(iter(by_seed.values()))["settings"],
                    **summary([figures(cell) for cell in by_seed.values()]),
                    # Of retraining there is nothing to say: it is the target.
                    "paired": {} if name in ("megu", "retrain") else paired(apart[name], apart.get("megu", {})),
                    "equivalence": verdicts.get(name, {}),
                    "seeds": by_seed,
                    **({"variant_of": self.rows[name]} if name in self.variants else {}),
                }
        return {
            "request": described(self.base.inputs.data, self.base.inputs.request),
            "seeds": [arena.seed for arena in self.arenas],
            "methods": rows,
            "noise_floor": noise_floor([cell["metrics"] for cell in cells.get("retrain", {}).values()]),
        }


def _done(prepare: Callable[[], None]) -> Callable[[bool], None]:
    """What leaves its result in the run directory, as a cell computes it."""
    return lambda force: prepare()


def _opened(config: Config, tune: bool, say: Say) -> Cells:
    """The cells of a comparison, in a process that is to compute some."""
    comparison = Comparison(RunContext.open(config), say)
    comparison.base.runtime.start()
    return comparison.cells(tune)
