"""runs.jsonl: what depends on the moment, such as time, device and seconds; no stage reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megu_cli.errors import ArtifactError
from megu_cli.run import files
from megu_cli.run.json_lines import JSONLines


class RunLog:
    """The log of a run directory, a line for each artifact that was made.

    Args:
        out: The run directory.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / files.LOG
        self._lines = JSONLines(self.file, "times that stood there are not known")

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; ``fingerprint`` names the artifact, ``seconds``, ``machine`` and ``files`` are read back.

        Raises:
            ArtifactError: The file cannot be written.
        """
        self._lines.append(entry)

    def last(self, fingerprint: str) -> dict[str, Any] | None:
        """The last entry for the artifact with this fingerprint."""
        return next((entry for entry in reversed(self._entries()) if entry.get("fingerprint") == fingerprint), None)

    def written(self, name: str) -> list[dict[str, Any]]:
        """What is recorded of each file that megu has written here under this name; see `ownership.parts`."""
        found = [files.get(name) for entry in self._entries() if isinstance(files := entry.get("files"), dict)]
        return [record for record in found if isinstance(record, dict)]

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return self._lines.read()
        except ArtifactError:
            return []

    def seconds(self, fingerprint: str) -> tuple[float, str] | None:
        """Seconds that the artifact with this fingerprint last took, and on which machine; ``None`` if not known."""
        entry = self.last(fingerprint) or {}
        known = type(entry.get("seconds")) in (int, float) and "machine" in entry
        return (float(entry["seconds"]), str(entry["machine"])) if known else None
