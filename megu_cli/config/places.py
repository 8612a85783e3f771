"""Folders outside the run directory that data are looked for in."""

from __future__ import annotations

from pathlib import Path

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def downloads() -> Path:
    """The folder that data sets are downloaded to if data.root is not set."""
    return Path.home() / ".cache" / "megu" / "data"
