"""Experiment trackers: figures of the stages are reported to a tracker of the user's choice by Hugging Face Accelerate.

A tracker gets settings and figures: no path, no name of an image, a class or a person, and no position of an image. It
has no say in any result, and what goes wrong in it costs a warning.
"""

from __future__ import annotations

import contextlib
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megu_cli.config import Config
from megu_cli.config.base import Section
from megu_cli.config.model_sources import source_of
from megu_cli.errors import ConfigError
from megu_cli.run import files

# Sections that a run has no use for.
_LEFT_OUT = ("compare", "record", "tracking")
# Beyond the project: MLflow would note the path of the program.
_STARTED_WITH: Mapping[str, Mapping[str, Any]] = {"mlflow": {"tags": {"mlflow.source.name": "megu"}}}
_VERDICTS = {"not forgotten": -1, "undecided": 0, "forgotten": 1}
# Parts of the evaluation that hold figures by fixed names, and none of a class.
_FIGURES = ("original", "mask", "unlearned", "oracle", "comparison", "time")


class Tracker:
    """The tracker of one command.

    Args:
        config: The config; it names a tracker.
        warn: Called with a line if the tracker fails; nothing more is reported then.

    Raises:
        ConfigError: Accelerate, or the tracker's package, is not installed.
    """

    def __init__(self, config: Config, warn: Callable[[str], None]) -> None:
        self._config, self._warn = config, warn
        self._kind = _tracker_class(config.tracking.tracker)
        self._by: Any = None
        self._failed = False
        self._steps = 0

    def stage(self, name: str, body: Mapping[str, Any], seconds: float) -> None:
        """Report the losses and accuracies of a stage by epoch, the figures of an evaluation, and the seconds."""

        def report() -> None:
            for row in (*_epochs(name, body), {**_figures(name, body), f"{name}/seconds": seconds}):
                self._log(row)

        self._attempt(report)

    def close(self) -> None:
        """End the tracker's run."""
        if self._by is not None:
            self._attempt(self._by.finish)

    def _log(self, row: Mapping[str, float]) -> None:
        if self._by is None:
            self._start()
        # Counted over all stages: Weights & Biases takes no step that is behind another.
        self._by.log(dict(row), step=self._steps)
        self._steps += 1

    def _start(self) -> None:
        """Begin a run of the tracker, at the first figures: a command with nothing to do leaves none."""
        import accelerate

        from megu_cli.execution.processes import world

        if world() == 1:
            # What trackers of Accelerate ask whether they are the first process; with several there is one already.
            accelerate.PartialState(cpu=True)
        project = self._config.tracking.project
        where = [str(self._config.out / files.TENSORBOARD)] if self._kind.requires_logging_directory else []
        started = self._kind(project, *where, **_STARTED_WITH.get(self._config.tracking.tracker, {}))
        # Earlier versions of Accelerate start a tracker when it is made.
        getattr(started, "start", lambda: None)()
        self._by = started
        started.store_init_configuration(settings(self._config))

    def _attempt(self, report: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            # Trackio prints, and stdout is for results.
            with contextlib.redirect_stdout(sys.stderr):
                report()
        except Exception as error:  # of any package, network or disk
            self._failed = True
            told = next(iter(str(error).strip().splitlines()), "")[:300]
            why = f"{type(error).__name__}: {told}" if told else type(error).__name__
            self._warn(f"warning: tracking.tracker: {self._config.tracking.tracker} failed and is left out ({why})")


def _tracker_class(name: str) -> Any:
    """The class of Accelerate.

    Raises:
        ConfigError: It, or the tracker's package, is not installed.
    """
    try:
        from accelerate import tracking
    except ImportError:
        raise ConfigError(
            f"tracking.tracker: {name} needs Hugging Face Accelerate", "pip install 'megu-cli[accelerate]'"
        ) from None
    if name not in tracking.LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"tracking.tracker: the installed Accelerate knows no {name}", "pip install --upgrade accelerate"
        )
    if name not in map(str, tracking.get_available_trackers()):
        raise ConfigError(f"tracking.tracker: {name} is not installed", f"pip install {name}")
    return tracking.LOGGER_TYPE_TO_CLASS[name]


def settings(config: Config) -> dict[str, bool | int | float | str]:
    """Settings by dotted key: numbers, switches, and words of a fixed list; so neither paths nor names."""
    found: dict[str, bool | int | float | str] = {}

    def add(section: Section, prefix: str) -> None:
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, Section):
                if prefix or name not in _LEFT_OUT:
                    add(value, f"{prefix}{name}.")
            elif isinstance(value, (bool, int, float)) or (
                isinstance(value, str) and value in _words(field.annotation)
            ):
                found[f"{prefix}{name}"] = value

    add(config, "")
    source, short = source_of(config.model.name)
    # A name of one's own may be a path.
    own = source.directory or source.prefix == "python:"
    return {**found, "data.name": config.data.name, "model.name": source.prefix if own else f"{source.prefix}{short}"}


def _words(annotation: Any) -> set[str]:
    """The strings that a `Literal` in a type allows."""
    if typing.get_origin(annotation) is typing.Literal:
        return {word for word in typing.get_args(annotation) if isinstance(word, str)}
    return {word for part in typing.get_args(annotation) for word in _words(part)}


def _epochs(stage: str, body: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """The figures of a training, epoch by epoch."""
    curves = {key: body[key] for key in ("loss", "validation_acc") if body.get(key)}
    for epoch, values in enumerate(zip(*curves.values(), strict=True), 1):
        yield {f"{stage}/epoch": epoch, **{f"{stage}/{key}": value for key, value in zip(curves, values, strict=True)}}


def _figures(stage: str, body: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation, and its verdict as a number."""
    found: dict[str, float] = {}

    def add(part: Mapping[str, Any], prefix: str) -> None:
        for name, value in part.items():
            if isinstance(value, Mapping):
                add(value, f"{prefix}{name}/")
            elif isinstance(value, (int, float)):
                found[f"{prefix}{name}"] = float(value)

    if "unlearned" not in body:
        return {}
    add({name: body[name] for name in _FIGURES if body.get(name)}, f"{stage}/")
    if (word := body.get("verdict", {}).get("verdict")) in _VERDICTS:
        found[f"{stage}/verdict"] = _VERDICTS[word]
    return found
