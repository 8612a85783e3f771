"""Raw answers, appended as they arrive, so that an interrupted query resumes where it stopped and never pays twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from megu_cli.run.artifacts import digest
from megu_cli.run.json_lines import JSONLines


class Answers:
    """The file of raw answers: one JSON object a line, keyed by what was asked.

    A line that does not match its checksum is no answer: what was asked there is asked again.

    Args:
        path: The file; it need not be there.

    Raises:
        ArtifactError: It is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lines = JSONLines(path, "what was answered there is asked again")
        self._known = {entry["key"]: entry for entry in self._lines.read() if isinstance(entry.get("key"), str)}

    def find(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to what was asked, if it was given before."""
        return self._known.get(digest(asked))

    def append(self, asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """Write an answer down, synced to disk, beside what was asked; thread-safe.

        Raises:
            ArtifactError: The file cannot be written.
        """
        entry = {"key": digest(asked), **asked, **answer}
        with self._lock:
            self._lines.append(entry)
            self._known[entry["key"]] = entry
        return entry
