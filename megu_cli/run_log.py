"""runs.jsonl: what depends on the moment, such as time, device and seconds; no stage reads it."""

from __future__ import annotations

import json
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
        """Add a line; ``fingerprint`` names the artifact, ``seconds`` and ``machine`` are read back."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def last(self, fingerprint: str) -> dict[str, Any] | None:
        """The last entry for the artifact with this fingerprint."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        for line in reversed(lines):
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:  # a line cut short by a kill
                continue
            if entry.get("fingerprint") == fingerprint:
                return entry
        return None

    def seconds(self, fingerprint: str) -> tuple[float, str] | None:
        """Seconds that the artifact with this fingerprint last took, and on which machine; ``None`` if not known."""
        entry = self.last(fingerprint)
        return (float(entry["seconds"]), str(entry["machine"])) if entry else None
