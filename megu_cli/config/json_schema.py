"""The JSON schema of the config: completion, explanations and checks in an editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from megu_cli.config.schema import Config
from megu_cli.errors import ConfigError
from megu_cli.run import reading
from megu_cli.run.writing import replacing

# Lies beside a config that `megu init` or `megu demo` writes, and is named in its first line.
SCHEMA_FILE = "megu.schema.json"
MODELINE = "# yaml-language-server: $schema="
_TITLE = "megu.yaml"


class _Generator(GenerateJsonSchema):
    """Settings have a name and a description; a title would repeat the name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No setting has a title."""
        return False


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a megu.yaml, made from the declared settings."""
    described = Config.model_json_schema(schema_generator=_Generator)
    # Names are text, but YAML reads 7 as a number, and the config takes it for the name 7.
    forget = described["$defs"]["ForgetConfig"]["properties"]["subclasses"]
    classes = described["$defs"]["ModelConfig"]["properties"]["classes"]
    for setting in (forget, classes):
        names = next(kind for kind in setting["anyOf"] if kind.get("type") == "array")
        names["items"] = {"type": ["string", "integer"]}
    # The validator that keeps a key out of the messages hides the type.
    described["$defs"]["MLLMConfig"]["properties"]["key_env"]["type"] = "string"
    return {"$schema": GenerateJsonSchema.schema_dialect, **described, "title": _TITLE}


def schema_text() -> str:
    """Return the JSON schema as the text of a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def refuse_foreign_schema(folder: Path) -> None:
    """See that no file of the user's stands where the JSON schema would.

    Raises:
        ConfigError: One does.
    """
    file = folder / SCHEMA_FILE
    if file.exists() and not _is_ours(file):
        raise ConfigError(f"{file} was not written by megu and would be replaced", "Move it elsewhere.")


def write_schema(folder: Path) -> Path:
    """Write the JSON schema into the folder of a config, so that an editor finds it without a network.

    Raises:
        ConfigError: Another file has its name.
        ArtifactError: The folder cannot be written.
    """
    refuse_foreign_schema(folder)
    file = folder / SCHEMA_FILE
    with replacing(file) as temporary:
        temporary.write_text(schema_text(), encoding="utf-8")
    return file


def _is_ours(file: Path) -> bool:
    """True if a file is the schema of this or another version of megu."""
    try:
        found = json.loads(reading.content(file))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("title") == _TITLE
