"""Errors that a user can act on, each with the exit code that the process ends with."""

from __future__ import annotations

import errno
import reprlib

# What the system says where a disk is full, a quota used up or a file as large as it may be.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 200
_REPR.maxlevel = 2


def brief(value: object) -> str:
    """A value of the user's as a message shows it: at most about 200 characters."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:98]}...{text[-98:]}"


class MeguError(Exception):
    """An expected failure: what went wrong, where, and what to do next.

    Args:
        message: What is wrong, naming the file or key.
        hint: The next step for the user, printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(MeguError):
    """The command line, the config, the data or a file handed over is at fault."""

    exit_code = 2


class ConfigError(InputError):
    """The configuration is at fault."""


class DataError(InputError):
    """The data set or the forget request is at fault."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit the model."""


class ArtifactError(InputError):
    """A file of the run directory is missing, corrupt or stale, or the directory is in use."""


class ForeignFileError(ArtifactError):
    """A whole file that stands where an artifact should, and is not megu's: it must not be replaced."""


class RequirementError(MeguError):
    """A requirement of ``megu eval --require`` is not met."""

    exit_code = 3


class RecordError(MeguError):
    """A deletion record does not hold, or forgotten images came back."""

    exit_code = 3


class DivergedError(MeguError):
    """The loss of a training is no longer finite."""


class MLLMError(MeguError):
    """The similarity backend failed, or what it answered carries no information."""

    exit_code = 4


class Faults:
    """Collects what is wrong, so that it is said at once: the first five in words, the others as a number.

    Args:
        what: What is at fault, as in "4 ... ".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.first: list[str] = []
        self.number = 0

    def add(self, fault: str) -> None:
        """Note a fault."""
        self.number += 1
        if len(self.first) < 5:
            self.first.append(fault)

    def check(self, hint: str = "") -> None:
        """Raise if there are any.

        Raises:
            DataError: There are; a single one is the message itself.
        """
        if not self.number:
            return
        if self.number == 1:
            raise DataError(self.first[0], hint)
        shown = "\n".join(f"  {fault}" for fault in self.first)
        more = f"\n  and {self.number - 5} more" if self.number > 5 else ""
        raise DataError(f"{self.number} {self.what}\n{shown}{more}", hint)
