"""Raw answers, appended as they arrive, so that an interrupted query resumes where it stopped and never pays twice."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from megu_cli.artifacts import digest
from megu_cli.errors import ArtifactError


class Answers:
    """The file of raw answers: one JSON object a line, keyed by what was asked.

    Args:
        path: The file; it need not be there.

    Raises:
        ArtifactError: It is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._ready = False
        self._known: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill, or not ours

    def find(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to what was asked, if it was given before."""
        return self._known.get(digest(asked))

    def append(self, asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """Write an answer down, synced to disk, beside what was asked; thread-safe.

        Raises:
            ArtifactError: The file cannot be written.
        """
        entry = {"key": digest(asked), **asked, **answer}
        # ASCII only, so that a line cut anywhere is still text.
        line = json.dumps(entry, allow_nan=False).encode("ascii") + b"\n"
        with self._lock:
            try:
                self._mend()
                with self.path.open("ab") as stream:
                    stream.write(line)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise ArtifactError(f"{self.path} cannot be written: {error.strerror or error}") from None
            self._known[entry["key"]] = entry
        return entry

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def _mend(self) -> None:
        """Before the first new line: end a last line that lacks its end, or cut it off where it is torn."""
        if self._ready:
            return
        self._ready = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        if not content or content.endswith(b"\n"):
            return
        whole, newline, last = content.rpartition(b"\n")
        with self.path.open("r+b") as stream:
            try:
                json.loads(last)
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
            except ValueError:
                stream.truncate(len(whole) + len(newline))
