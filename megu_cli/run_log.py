"""runs.jsonl: what depends on the moment, such as time, device and seconds; no stage reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunLog:
    """The log of a run directory, a line for each artifact that was made.

    Args:
        out: The run directory.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / "runs.jsonl"

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line, synced to disk; ``fingerprint`` names the artifact.

        ``seconds``, ``machine`` and ``files`` are read back.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def last(self, fingerprint: str) -> dict[str, Any] | None:
        """The last entry for the artifact with this fingerprint."""
        found = [entry for entry in self._entries() if entry.get("fingerprint") == fingerprint]
        return found[-1] if found else None

    def written(self, name: str) -> list[dict[str, Any]]:
        """What is recorded of each file that megu has written here under this name; see `artifacts.parts`."""
        found = [files.get(name) for entry in self._entries() if isinstance(files := entry.get("files"), dict)]
        return [record for record in found if isinstance(record, dict)]

    def _entries(self) -> Iterator[dict[str, Any]]:
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                entry: Any = json.loads(line)
            except (ValueError, RecursionError):  # a line cut short by a kill
                continue
            if isinstance(entry, dict):
                yield entry

    def seconds(self, fingerprint: str) -> tuple[float, str] | None:
        """Seconds that the artifact with this fingerprint last took, and on which machine; ``None`` if not known."""
        entry = self.last(fingerprint)
        return (float(entry["seconds"]), str(entry["machine"])) if entry else None
