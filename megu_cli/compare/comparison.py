"""`megu compare`: one request through many methods and seeds, on the same splits, original, oracle and clock.

Under ``compare/<seed>/`` each method leaves its figures in a file with a key of its own, so a run that was cut short
goes on where it stopped, and another method or seed computes only what is new.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from megu_cli.baselines import methods
from megu_cli.compare import tuning
from megu_cli.compare.arena import CONFIDENCES, VERSION, Arena, Say, keep
from megu_cli.compare.equivalence import equivalences
from megu_cli.compare.methods import OURS, Contender, chosen, variants
from megu_cli.compare.statistics import Row, against_oracle, distances, figures, paired, summary
from megu_cli.errors import ConfigError, MeguError
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.run import files, ownership, writing


class Comparison:
    """One request, several methods and seeds.

    Args:
        base: The config's run; its run directory holds all results.
        say: Told in a line what is computed, kept and failed.

    Raises:
        ConfigError: A method or one of its settings does not exist.
    """

    def __init__(self, base: RunContext, say: Say = lambda line: None) -> None:
        self.base, self.say = base, say
        settings = base.config.compare
        self.names = chosen(settings.methods, rated=base.config.mllm.backend != "none")
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
        settings: dict[str, dict[str, Any] | None] = {name: self._given(name) for name in self.names}
        for name in self.names if tune else ():
            trials = []
            for number, point in enumerate(self._points(name)):
                action, reason, score = self.tuning.plan_trial(name, number, {**self._given(name), **point})
                rows.append((f"tune {name} {tuning.described(point)}", action, reason))
                trials.append({"settings": dict(point), "score": score})
            if trials:
                known = all(row[1] == "keep" for row in rows[-len(trials) :])
                settings[name] = {**self._given(name), **tuning.winner(trials)} if known else None
        for arena in self.arenas:
            for name, method in self.rows.items():
                untuned = ("run", "its settings are still to be chosen")
                given = self._varied(name, settings)
                found = untuned if given is None else arena.plan(Contender(name, method, given), self._rival(arena))
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
        self.base.runtime.start()
        Pipeline(self.base, self.say).preflight()
        if set(OURS) & set(self.rows.values()):
            # All seeds share these ratings. First, since they may fail for reasons outside.
            Pipeline(self.base, self.say).run(goals=["transition"])
        from megu_cli.evaluation.ulira import attacks

        for arena in self.arenas:
            arena.prepare()
        settings: dict[str, dict[str, Any] | None] = {name: self._given(name) for name in self.names}
        trials: dict[str, list[dict[str, Any]]] = {}
        if tune:
            self.tuning.prepare()
            trials = {name: self._trials(name, force) for name in self.names if self._points(name)}
            self.tuning.forget_loaded()
        failed: dict[str, dict[str, str]] = {}
        for name, tried in trials.items():
            try:
                settings[name] = {**self._given(name), **tuning.winner(tried)}
            except MeguError as error:
                settings[name] = None
                said = {str(arena.seed): error.message for arena in self.arenas}
                failed |= {row: dict(said) for row, method in self.rows.items() if method == name}

        cells: dict[str, dict[str, Row]] = {name: {} for name in self.rows}
        confidences: dict[str, dict[str, list[float]]] = {name: {} for name in self.rows}
        contents: dict[str, str] = {}
        for arena in self.arenas:
            for name, method in self.rows.items():
                if (given := self._varied(name, settings)) is None:
                    continue
                try:
                    cell = arena.cell(Contender(name, method, given), self._rival(arena), force)
                except Exception as error:  # one method that fails must not cost the others' results
                    failed.setdefault(name, {})[str(arena.seed)] = self._failure(f"{arena.seed}/{name}", error)
                else:
                    contents[f"{arena.seed}/{name}"] = cell.content
                    row = {**cell.body, **arena.clock(cell)}
                    if kept := row.pop(CONFIDENCES, None):  # cells of earlier versions have none
                        confidences[name][str(arena.seed)] = kept
                    cells[name][str(arena.seed)] = row
            arena.forget_loaded()

        body = self._body(cells) | {"failed": failed, "tuned": trials, "ulira": attacks(confidences, "retrain")}
        if tune:
            body["tuning"] = {"seed": self.tuning.seed, "images": len(self.tuning.context.inputs.data.train)}
        parts = {"stage": "compare", "version": VERSION, "inputs": contents}
        keep(self.base.directory.out / files.COMPARISON, body, parts, self.base.config.seed)
        return body

    def _failure(self, what: str, error: Exception) -> str:
        """What is said of a method that failed; the traceback of a fault of its own goes to a file."""
        if isinstance(error, MeguError):
            message = error.message
        else:
            name = re.sub(r"[^\w.=]+", "-", what)
            log = f"{files.COMPARE_FOLDER}/{name}.error.txt"
            ownership.refuse_foreign(self.base.directory.out, log)
            (self.base.directory.out / files.COMPARE_FOLDER).mkdir(exist_ok=True)
            with writing.replacing(self.base.directory.out / log) as temporary:
                temporary.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            message = f"{type(error).__name__}: {error}".splitlines()[0] + f" ({log})"
        self.say(f"{what}: FAILED: {message}")
        return message

    def _given(self, name: str) -> dict[str, Any]:
        return dict(self.base.config.compare.settings.get(name, {}))

    def _varied(self, name: str, settings: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
        """The settings of a row; a variant has its method's, but for those it changes. ``None``: not chosen yet."""
        if name not in self.variants:
            return settings[name]
        variant = self.variants[name]
        base = settings.get(variant.method, self._given(variant.method))
        return None if base is None else {**base, **variant.settings}

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

    def _trials(self, name: str, force: bool) -> list[dict[str, Any]]:
        """Each point of a method's grid with its score; ``None`` where the method failed."""
        trials: list[dict[str, Any]] = []
        for number, point in enumerate(self._points(name)):
            score = None
            try:
                score = self.tuning.trial(name, number, {**self._given(name), **point}, force).body["score"]
            except Exception as error:
                self._failure(f"tuning {name} with {tuning.described(point)}", error)
            trials.append({"settings": dict(point), "score": score})
        return trials

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
