"""The configuration: one YAML file, validated in one go.

Every setting is declared here once, with its type, default and meaning; ``megu init`` writes a config
with these very words. Precedence: defaults < preset < YAML < flags.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megu_cli.config.base import Section, alternatives, checked_path, is_path
from megu_cli.config.model_sources import source_of
from megu_cli.config.presets import PRESETS
from megu_cli.config.schema import CompareConfig, Config
from megu_cli.errors import ArtifactError, ConfigError, brief
from megu_cli.run import artifacts, files, reading


def load_config(file: Path, overrides: list[str] | None = None, flags: dict[str, Any] | None = None) -> Config:
    """Read, merge and validate a configuration.

    Args:
        file: The YAML file. Relative paths in it are relative to its folder.
        overrides: ``a.b=value`` settings, each value parsed as YAML; relative paths are relative to the
            working directory.
        flags: Values of dedicated flags (``seed``, ``device``, ``out``); ``None`` means not given.

    Raises:
        ConfigError: The file is missing or no YAML, or settings are at fault; all faults are named together.
    """
    checked_path(file, "-c")
    from_yaml = _anchored(_absolute(Config, _read_yaml(file), file.resolve().parent), file.resolve().parent)
    from_flags: dict[str, Any] = {}
    for override in overrides or []:
        _merge(from_flags, parse_override(override))
    _merge(from_flags, {k: v for k, v in (flags or {}).items() if v is not None})
    from_flags = _anchored(_absolute(Config, from_flags, Path.cwd()), Path.cwd())

    merged: dict[str, Any] = {}
    own = _merge(_merge({}, from_yaml), from_flags)
    preset = own.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        _merge(merged, PRESETS[preset].settings)
    _merge(merged, own)
    # The default run directory, too, lies beside the YAML.
    merged.setdefault("out", file.resolve().parent / Config.model_fields["out"].default)
    if merged.get("method", "auto") == "auto" and _retrained_in(merged["out"]):
        merged["method"] = "retrain"
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
        count = error.error_count()
        raise ConfigError(
            f"{file}: {count} setting{'s are' if count > 1 else ' is'} at fault\n{faults}",
            "`megu init` writes a config with every setting explained.",
        ) from None


def _retrained_in(out: Any) -> bool:
    """True if the model in a run directory was made with ``method: retrain``.

    Raises:
        ConfigError: There is a model, finetune.json is damaged, and eval.json is damaged or missing.
    """
    if not isinstance(out, Path) or not os.path.lexists(out / files.FINETUNE):
        return False
    try:
        settings = artifacts.read_meta(out / files.FINETUNE, artifacts.STAGE_KEYS)["settings"]
        return bool(settings.get("method") == "retrain")
    except (ArtifactError, OSError) as error:
        fault = error
    # The damaged artifact is made again by the same method: no retrained model is replaced by an unlearned one.
    try:
        artifacts.read_meta(out / files.EVALUATION)
        return "retrained_by" in artifacts.read_body(out / files.EVALUATION)
    except (ArtifactError, OSError):
        if not (out / files.WEIGHTS).is_file():
            return False  # there is no model that could be lost
    reason = fault.message if isinstance(fault, ArtifactError) else f"{files.FINETUNE} cannot be read"
    raise ConfigError(
        f"{out}: {reason}, and no whole {files.EVALUATION} tells whether {files.WEIGHTS} was unlearned or retrained",
        "Say how to make it again: --set method=megu unlearns, --set method=retrain trains from scratch.",
    )


Kind = TypeVar("Kind", bound=Section)


def section(kind: type[Kind], name: str, given: Kind | Mapping[str, Any] | None) -> Kind:
    """One section of the config by itself, validated; what is not given has its default.

    Raises:
        ConfigError: Settings are at fault; all faults are named together.
    """
    if isinstance(given, kind):
        return given
    try:
        return kind.model_validate(dict(given or {}))
    except ValidationError as error:
        faults = "; ".join(_describe({**fault, "loc": (name, *fault["loc"])}) for fault in error.errors())
        raise ConfigError(faults) from None


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """The config with other values for dotted keys, validated.

    Raises:
        ConfigError: A value is at fault; all faults are named together.
    """
    raw = config.model_dump()
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = raw
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: unknown key; {name} has no settings")
        section[last] = value
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_describe, error.errors()))) from None


class _Loader(yaml.SafeLoader):
    """YAML in which a class may be called no, 007, 1:30 or 2026-01-31.

    YAML 1.1 makes of these a truth value, numbers to other bases and a date. Here they are text, which pydantic reads
    as a truth value or a number where a setting is one. An alias is refused, since a few of them can stand for
    gigabytes; so are a key that stands there twice, and a value that does not fit its explicit tag.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, "aliases are not read: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, AttributeError, TypeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(None, None, f"this is not a value of type {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for name, _ in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                continue
            if name.value in lines:
                raise yaml.MarkedYAMLError(
                    None, None, f"the key {brief(name.value)} stands in lines {lines[name.value]} and {line}"
                )
            lines[name.value] = line
        return super().construct_mapping(node, deep)


# PyYAML's resolvers by first character, without those for scalars but null; then the plain ones.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.endswith((":null", ":merge"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?$", "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_form), list(_first))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = reading.content(file).decode()
    except FileNotFoundError:
        raise ConfigError(f"no config at {file}", "Name one with -c FILE, or write one with `megu init`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{file} is not valid YAML: it is nested too deeply") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds no settings", "`megu init` writes a config to start from.")
    return raw


def parse_override(override: str, option: str = "--set") -> dict[str, Any]:
    """Return the settings of a ``key.subkey=value``.

    Args:
        override: The text.
        option: The option of the command line that has it, for the message.

    Raises:
        ConfigError: It has another form.
    """
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        form = "key.subkey=value" if option == "--set" else "key=value"
        raise ConfigError(f"{option} {brief(override)} is not of the form {form}")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.scanner.ScannerError, yaml.parser.ParserError, yaml.reader.ReaderError):
        value = text
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{option} {key.strip()}: {' '.join(str(error).split())}") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay ``over`` on ``base`` in place; mappings merge, except the forget request and superclasses."""
    for key, value in over.items():
        # A request given by a flag replaces the file's: merging `classes` with `random` would give two.
        mergeable = key not in ("forget", "superclasses")
        if mergeable and isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        elif key == "forget" and isinstance(value, dict) and isinstance(base.get(key), dict):
            # What was forgotten before stays so whatever is asked for now.
            beside = ("duplicates", "already", "already_missing")
            another = any(k not in beside for k in value)
            kept = {k: v for k, v in base[key].items() if k in beside or not another}
            base[key] = {**kept, **copy.deepcopy(value)}
        else:
            base[key] = copy.deepcopy(value)
    return base


# Words for a truth value, where a setting is one or a path.
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _absolute(model: type[BaseModel], raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the values of Path settings absolute, against the folder that their source stands in."""
    result: dict[str, Any] = {}
    for key, value in raw.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        kinds = alternatives(field.annotation) if field else ()
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section and isinstance(value, dict):
            value = _absolute(section, value, folder)
        elif Path in kinds and isinstance(value, (str, Path)) and (str not in kinds or is_path(value)):
            truth = _TRUTH.get(str(value).lower()) if bool in kinds else None
            value = _placed(value, folder, key) if truth is None else truth
        elif model is CompareConfig and key == "variants" and isinstance(value, dict):
            value = {name: _variant(given, folder) for name, given in value.items()}
        elif list[Path] in kinds and isinstance(value, list):
            value = [_placed(v, folder, key) if isinstance(v, (str, Path)) else v for v in value]
        result[key] = value
    return result


def _variant(given: Any, folder: Path) -> Any:
    """A variant of a comparison, whose settings are dotted keys, with absolute paths."""
    if not isinstance(given, dict):
        return given
    result: dict[str, Any] = {}
    for key, value in given.items():
        section, dot, last = key.rpartition(".") if isinstance(key, str) else ("", "", "")
        field = Config.model_fields.get(section) if dot else None
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            value = _absolute(kind, {last: value}, folder)[last]
        result[key] = value
    return result


def _placed(value: str | Path, folder: Path, key: str) -> Path:
    """A path of the user's against a folder.

    Raises:
        ConfigError: No file can have this path.
    """
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key}: {brief(str(value))}: there is no such user", "Write the folder out.") from None
    return checked_path(folder / path, key)


def _anchored(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the path in a model's name absolute, if its source says that it is one."""
    section = raw.get("model")
    name = section.get("name") if isinstance(section, dict) else None
    if not (isinstance(section, dict) and isinstance(name, str)):
        return raw
    source, rest = source_of(name)
    if not rest or source.placed is None:
        return raw
    place = _placed(rest, folder, "model.name")
    return {**raw, "model": {**section, "name": f"{source.prefix}{place}"}} if source.placed(rest, place) else raw


def _describe(fault: Any) -> str:
    """One validation fault as `key: what is wrong`, with the nearest known key for an unknown one."""
    location = fault["loc"]
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        section: Any = Config
        for part in location[:-1]:
            kinds = alternatives(section.model_fields[part].annotation)
            section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
        near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1, cutoff=0.5)
        return f"{key}: unknown key" + (
            f"; did you mean {near[0]}?" if near else f"; known: {', '.join(section.model_fields)}"
        )
    if fault["type"] == "missing":
        return f"{key}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    # A key may have been put into these two by mistake.
    silent = isinstance(fault["input"], dict) or fault["type"] in ("key_env", "base_url")
    shown = "" if silent else f" (got {brief(fault['input'])})"
    return f"{key or 'config'}: {message[0].lower()}{message[1:]}{shown}"
