"""What all sections of the config share: types of settings, and how paths are told from names."""

from __future__ import annotations

import errno
import os
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from megu_cli.errors import ConfigError, brief

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of the config: unknown keys are refused, and it is never changed.

    Attributes:
        added: Settings that came after the first artifacts. At their default they do not enter a key, so that older
            artifacts stay fresh.
    """

    added: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def unset(self) -> set[str]:
        """Those of `added` that are at their default."""
        return {name for name in self.added if getattr(self, name) == type(self).model_fields[name].default}

    def keyed(self) -> dict[str, Any]:
        """All settings as plain JSON data, as they enter the key of a stage."""
        return self.model_dump(mode="json", exclude=self.unset)


def checked_path(path: Path, key: str) -> Path:
    """The path, if a file can have it.

    Raises:
        ConfigError: It holds a NUL, or is too long for the file system.
    """
    try:
        os.lstat(path)
    except ValueError:
        raise ConfigError(f"{key}: {brief(str(path))} is no path: it holds a NUL or half a character") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{key}: {brief(str(path))} is too long a path") from None
    return path


def is_path(value: str | Path) -> bool:
    """Whether what may be a name or a path is a path."""
    return isinstance(value, Path) or value.startswith(("/", "./", "../", "~"))


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    return typing.get_args(annotation) or (annotation,)
