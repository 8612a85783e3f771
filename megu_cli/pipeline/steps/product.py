"""What the function of a stage takes from other stages, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megu_cli.models.weights import State
from megu_cli.run.artifacts import Artifact

Inputs = Mapping[str, Artifact]


@dataclass(frozen=True)
class Product:
    """What a stage makes.

    Attributes:
        artifact: It names the other files by digest.
        weights: Plain weight files.
        metadata: Of the weight files.
        files: Other files, by their path in the run directory.
        notes: What the user is told of them.
    """

    artifact: Artifact
    weights: dict[str, State] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
