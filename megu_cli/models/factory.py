"""Models that a function of the user's makes."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from megu_cli.errors import ConfigError, brief
from megu_cli.models.architecture import Architecture
from megu_cli.run.artifacts import file_digest


class FactoryModel(Architecture):
    """What ``FOLDER/MODULE:FUNCTION`` returns; it may come with trained weights, which are then where it starts."""

    def check(self) -> None:
        """See `Architecture.check`."""
        factory_of(self.name)

    def build(self, classes: int, channels: int) -> nn.Module:
        """See `Architecture.build`."""
        return _made(self.name, classes, channels)

    def channels(self) -> int | None:
        """See `Architecture.channels`."""
        if "channels" in _parameters(factory_of(self.name)):
            return None
        layers = _made(self.name, 2, 3).modules()
        return next((m.in_channels for m in layers if isinstance(m, nn.Conv2d)), None)

    def identity(self) -> Any:
        """See `Architecture.identity`."""
        factory_of(self.name)
        file = sys.modules[Path(self.name.rpartition(":")[0]).name.removesuffix(".py")].__file__
        return ["python:", Path(self.name).name, file_digest(Path(file)) if file else None]


def factory_of(name: str) -> Callable[..., nn.Module]:
    """The function that ``FOLDER/MODULE:FUNCTION`` names; its module is looked for in the folder, then as installed.

    This runs the user's own code, because they named it.

    Raises:
        ConfigError: There is no such module or function, or importing it fails.
    """
    place, colon, function = name.rpartition(":")
    folder, module = Path(place).parent, Path(place).name.removesuffix(".py")
    if not (colon and module and function):
        raise ConfigError(f"model.name: python:{name} is not of the form python:MODULE:FACTORY")
    here = folder.joinpath(*module.split("."))
    file = next((f for f in (here.with_name(f"{here.name}.py"), here / "__init__.py") if f.is_file()), None)
    known = sys.modules.get(module)
    if file and known and Path(str(known.__file__)).resolve() != file.resolve():
        del sys.modules[module]  # of another folder, by the same name
    if file:
        # As Python does for the folder of a script; it comes first, so that the folder decides.
        sys.path[:] = [str(folder), *(path for path in sys.path if path != str(folder))]
        importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result
            found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises; its exit is no success of megu's
        raise ConfigError(
            f"model.name: the module {module} cannot be imported: {type(error).__name__}: {error}",
            f"It is looked for in {folder} first, then among the installed ones.",
        ) from None
    if not callable(found):
        raise ConfigError(f"model.name: the module {module} has no function {brief(function)}")
    return found  # type: ignore[no-any-return]


def _parameters(factory: Callable[..., nn.Module]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except ValueError:  # a builtin has no signature
        return {}


def _made(name: str, classes: int, channels: int) -> nn.Module:
    """What the user's factory gives, told of the number of classes and channels where it takes them."""
    factory = factory_of(name)
    parameters = _parameters(factory)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {"classes": classes, "channels": channels}
    given = {key: value for key, value in given.items() if open_ended or key in parameters}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model = factory(**given)
    except (Exception, SystemExit) as error:  # whatever the user's factory raises
        told = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ConfigError(
            f"model.name: python:{Path(name).name}({told}) failed: {type(error).__name__}: {error}",
            "It is called with classes and channels where it takes arguments of these names, else without.",
        ) from None
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name: python:{Path(name).name} gave a {type(model).__name__}, no torch.nn.Module")
    return copy.deepcopy(model)  # a factory may give the same model each time
