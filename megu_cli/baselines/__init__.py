"""Other methods, one short file each, to set MeGU beside; and the registry of all of them.

The registry knows names, versions and grids without importing torch; a method's code is imported when it runs.
A package of the user's own adds methods through the entry-point group ``megu.methods``: see docs/methods.md.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import product
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megu_cli.errors import ConfigError, brief

GROUP = "megu.methods"


@dataclass(frozen=True)
class Method:
    """A method of the registry.

    Attributes:
        name: As in ``megu compare --methods``.
        load: Imports and returns the function ``(model, task, *, settings)`` that trains the model in place.
        grid: The settings that ``megu compare --tune`` tries; empty where there is nothing to set.
        version: Changes whenever the same settings would give another result.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    grid: tuple[Mapping[str, Any], ...] = ()
    version: str = "1"

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of the method: its defaults, and what is given.

        Raises:
            ConfigError: It has no such setting, or a setting without a default is not given.
        """
        parameters = inspect.signature(self.load()).parameters
        own = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key != "name"}
        unknown = [key for key in given if key not in own]
        if unknown:
            known = f"Its settings are: {', '.join(own)}." if own else "It has no settings."
            raise ConfigError(f"compare.settings: {self.name} has no setting {', '.join(unknown)}", known)
        result = {**own, **{key: self._typed(key, value, own[key]) for key, value in given.items()}}
        missing = [key for key, value in result.items() if value is inspect.Parameter.empty]
        if missing:
            raise ConfigError(f"compare.settings: {self.name} needs a value for {', '.join(missing)}")
        return result

    def _typed(self, key: str, value: Any, default: Any) -> Any:
        """A setting that YAML gives as text, such as 1e-3 or no, as what its default is."""
        if not isinstance(value, str) or not isinstance(default, (bool, int, float)):
            return value
        try:
            return TypeAdapter(type(default)).validate_python(value)
        except ValidationError:
            kind = type(default).__name__
            raise ConfigError(f"compare.settings: {self.name}: {key} is {brief(value)}, which is no {kind}") from None


# Every grid has as many points, so that no method is tuned harder than another. The defaults are one of them; the first
# is near to doing nothing, which is the best that some methods can do for single images.
GRID_SIZE = 4


def _grid(**values: tuple[Any, ...]) -> tuple[Mapping[str, Any], ...]:
    return tuple(dict(zip(values, point, strict=True)) for point in product(*values.values()))


def _builtin(name: str, function: str = "", version: str = "1", **grid: tuple[Any, ...]) -> Method:
    def load() -> Callable[..., Any]:
        module = importlib.import_module(f"megu_cli.baselines.{name}")
        return getattr(module, function or name)  # type: ignore[no-any-return]

    return Method(name, load, _grid(**grid) if grid else (), version)


_BUILTIN = {
    method.name: method
    for method in (
        _builtin("original"),
        _builtin("retrain"),
        _builtin("finetune", lr=(0.02, 0.05, 0.1, 0.2)),
        _builtin("neggrad_plus", beta=(0.011, 0.05), lr=(0.01, 0.03)),
        _builtin("amnesiac", version="2", lr=(0.0005, 0.005, 0.02, 0.05)),
        _builtin("bad_teacher", weight=(0.2, 1.0), lr=(0.001, 0.01)),
        _builtin("unsir", lr=(0.01, 0.02, 0.05, 0.1)),
        _builtin("ssd", alpha=(10.0, 20.0, 50.0, 100.0)),
        _builtin("scrub", version="2", alpha=(0.1, 0.5), lr=(0.0001, 0.001)),
        _builtin("salun", version="2", lr=(0.0005, 0.01, 0.05, 0.1)),
        _builtin("boundary_shrink", bound=(0.1, 0.3), lr=(0.00005, 0.0001)),
        _builtin("delete", lr=(0.00003, 0.00005, 0.0001, 0.0005)),
        _builtin("msg", share=(0.3, 0.6), lr=(0.02, 0.05)),
        _builtin("ct", epochs=(3, 5), lr=(0.02, 0.05)),
        _builtin("trew", lr=(0.00001, 0.001, 0.005, 0.02)),
        _builtin("svd", alpha_r=(1000.0, 100.0), alpha_f=(3.0, 30.0)),
        _builtin("amun", lr=(0.001, 0.01, 0.05, 0.1)),
        _builtin("lotus", alpha=(0.0, 8.0), lr=(0.00001, 0.0001)),
        _builtin("sfron", alpha=(0.0, 5.0), lr=(0.001, 0.01)),
        _builtin("mask", "mask_classes"),
        _builtin("new_head", lr=(0.001, 0.01, 0.1, 0.5)),
        _builtin("bias_shift", share=(0.9, 0.5, 0.1, 0.0)),
    )
}


def methods() -> dict[str, Method]:
    """Name -> method, the built-in ones first, then those of installed packages.

    Raises:
        ConfigError: A package's method has the name of a built-in one, or of another package's.
    """
    result = dict(_BUILTIN)
    for point in entry_points(group=GROUP):
        if not re.fullmatch(r"\w[\w.-]*", point.name):
            # Its results lie in files of its name.
            raise ConfigError(
                f"the method {point.name!r} of {point.value} is no plain name",
                f"Rename the entry point in the group {GROUP}: letters, digits, '_', '-' and '.'.",
            )
        if point.name in result:
            raise ConfigError(
                f"the method {point.name} of {point.value} has a name that is taken",
                f"Rename the entry point in the group {GROUP} of the package that brings it.",
            )
        result[point.name] = _foreign(point)
    return result


def _foreign(point: EntryPoint) -> Method:
    """A method of another package; its version follows its source, since nobody bumps a version while developing."""
    try:
        function = point.load()
        source = inspect.getsource(inspect.getmodule(function) or function).encode()
    except Exception as error:  # whatever the package does when it is imported
        message = f"the method {point.name} cannot be loaded from {point.value}: {error}"

        def fail() -> Callable[..., Any]:
            raise ConfigError(message, "Mend or uninstall the package that brings it.")

        return Method(point.name, fail)
    return Method(
        point.name,
        lambda: function,
        tuple(getattr(function, "grid", ())),
        hashlib.sha256(source).hexdigest(),
    )
