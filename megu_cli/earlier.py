"""Earlier requests: what a checkpoint was made to forget before (``forget.already``), and the record kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megu_cli import artifacts
from megu_cli.checkpoints import UNLEARNED
from megu_cli.config import Config, DataConfig, load_config
from megu_cli.data import Dataset, holding_out
from megu_cli.deletion_list import has_indices, listed
from megu_cli.errors import ConfigError, DataError
from megu_cli.forget import Earlier, Request, asked, class_positions, resolve


class Already:
    """The setting ``forget.already``: run directories, deletion lists and configs of earlier requests.

    Args:
        given: The setting; ``None`` where nothing is said.
        checkpoint: The user's own, where there is one.
        data: Of this run; ``None`` does not hold that of earlier configs against it.
        within: The configs that led here, from one's ``forget.already`` to the next one's.
    """

    def __init__(
        self,
        given: Sequence[Path] | None,
        checkpoint: Path | None = None,
        data: DataConfig | None = None,
        within: Sequence[Path] = (),
    ) -> None:
        self.given, self.checkpoint, self.data, self.within = given, checkpoint, data, within

    @classmethod
    def told(cls, record: Mapping[str, Any]) -> Already:
        """What a `record` tells, for other data."""
        made = cls(None)
        made.__dict__["records"] = [recorded(record, "the record")]
        return made

    @cached_property
    def configs(self) -> list[tuple[Config, Already]]:
        """The configs among them, each with what was forgotten before it.

        Raises:
            ConfigError: One cannot be read, leads back to itself, or counts images in other data.
        """
        found = []
        for path in self.given or []:
            if path.suffix not in (".yaml", ".yml"):
                continue
            chain = [*self.within, path.resolve()]
            if path.resolve() in self.within:
                raise ConfigError(f"forget.already: {path} leads back to itself")
            config = load_config(path)
            counted = config.forget.random or (config.forget.samples and has_indices(config.forget.samples))
            if counted and self.data and _counted_in(config.data) != _counted_in(self.data):
                raise ConfigError(
                    f"forget.already: {path} draws or counts images in other data than these",
                    "Name its run directory, which says which they were.",
                )
            found.append((config, Already(config.forget.already, None, self.data, chain)))
        return found

    @property
    def lists(self) -> list[Path]:
        """The deletion lists."""
        own = [path for path in self.given or [] if path.suffix == ".csv"]
        asked = [config.forget.samples for config, _ in self.configs if config.forget.samples]
        return [*own, *asked, *(path for _, before in self.configs for path in before.lists)]

    @property
    def subjects(self) -> list[str]:
        """The people that configs name."""
        asked = [str(person) for config, _ in self.configs for person in config.forget.subjects or []]
        return [*asked, *(person for _, before in self.configs for person in before.subjects)]

    @property
    def contents(self) -> list[int]:
        """Contents of the single images that runs have forgotten."""
        own = [content for _, contents in self.records for content in contents]
        return [*own, *(content for _, before in self.configs for content in before.contents)]

    @cached_property
    def records(self) -> list[tuple[list[str], list[int]]]:
        """(concepts, contents of images) that the earlier runs have forgotten.

        Raises:
            ConfigError: The checkpoint comes from a run directory that is not named.
            DataError: There is no record of what was forgotten.
        """
        given, own = self.given, self.checkpoint
        # model.safetensors, model.pth (or whichever suffix the first checkpoint had), the directory model/.
        unlearned = own is not None and own.stem == UNLEARNED and (own.parent / "finetune.json").is_file()
        if given is None and own is not None and unlearned:
            raise ConfigError(
                f"the checkpoint {own} was unlearned before, and forget.already does not say what it has forgotten",
                f"Set forget.already to [{own.parent}], or to [] if that may be learned again.",
            )
        return [
            recorded(artifacts.read(folder / "finetune.json").body.get("forgotten"), str(folder))
            for folder in given or []
            if folder.suffix not in (".csv", ".yaml", ".yml")
        ]

    def resolved(self, data: Dataset) -> Earlier:
        """All of it, in a data set. Images that are no longer in the data need no mention.

        Raises:
            MeguError: See `records` and `configs`; or a concept is not in the data, or a list is at fault.
        """
        result = Earlier()
        for concepts, contents in self.records:
            result = result.joined(of_record(data, concepts, contents))
        for path in self.given or []:
            if path.suffix == ".csv":
                result = result.joined(of_list(data, path))
        for config, before in self.configs:
            # A random request was drawn from what was not held out then.
            there = holding_out(data, config.data.validation, config.data.validation_from == "test")
            then = resolve(there, **asked(config.forget), earlier=before.resolved(data), seed=config.seed)
            result = result.joined(Earlier(torch.cat([then.forget, then.already]), then.concepts))
        return result


def _counted_in(data: DataConfig) -> dict[str, Any]:
    """What tells that there are other images to count or to draw from."""
    return data.model_dump(include={"name", "limit", "test_fraction"})


def of_record(data: Dataset, concepts: Sequence[str], contents: Sequence[int]) -> Earlier:
    """What the record of a run tells. Images that are no longer in the data need no mention.

    Raises:
        DataError: A concept is not in the data.
    """
    gone = class_positions(concepts, data.concepts, "forget.already")
    mask = torch.isin(data.train.concepts, torch.tensor(gone, dtype=torch.int64))
    if contents:
        mask |= torch.isin(data.train.images.contents(), torch.tensor(contents, dtype=torch.int64))
    return Earlier(torch.where(mask)[0], gone)


def of_list(data: Dataset, path: Path) -> Earlier:
    """What a deletion list tells. Images that are no longer in the data need no mention.

    Raises:
        DataError: The list cannot be read.
    """
    return Earlier(torch.tensor(listed(path, data, "forget.already", gone=True), dtype=torch.int64))


def record(data: Dataset, request: Request) -> dict[str, list[str]]:
    """What has been forgotten now and before, for a later request to read: nothing of it names an image.

    Images are given by the start of their content's sha256, so that the record holds when files are renamed, and tells
    nothing to who does not have the image.
    """
    return recording(data, Earlier(torch.cat([request.forget, request.already]), request.concepts))


def recording(data: Dataset, earlier: Earlier) -> dict[str, list[str]]:
    """A `record` of what was forgotten before."""
    gone = torch.isin(data.train.concepts[earlier.positions], torch.tensor(earlier.concepts, dtype=torch.int64))
    single = earlier.positions[~gone]
    # Hashing all pixels of a data set in memory is only worth it where single images were forgotten.
    contents = data.train.images.contents()[single].unique().tolist() if len(single) else []
    return {
        "concepts": [data.concepts[c] for c in earlier.concepts],
        "images": [f"{content & (2**64 - 1):016x}" for content in contents],
    }


def recorded(content: Any, where: str) -> tuple[list[str], list[int]]:
    """Concepts and contents of images in a `record`.

    Raises:
        DataError: It is none.
    """
    try:
        unsigned = [int(image, 16) for image in content["images"]]
        return [str(name) for name in content["concepts"]], [n - (n >> 63 << 64) for n in unsigned]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"forget.already: {where} does not say what was forgotten there") from None
