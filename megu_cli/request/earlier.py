"""Earlier requests: what a checkpoint was made to forget before, and the record of it.

An unlearned model carries the record itself (`marks.MARK`); ``forget.already`` names more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megu_cli import __version__
from megu_cli.config import Config, DataConfig, load_config
from megu_cli.data import Dataset, Split, holding_out
from megu_cli.data.names import composed
from megu_cli.errors import ArtifactError, ConfigError, DataError
from megu_cli.models.marks import mark_of, weights_digest, weights_digests
from megu_cli.models.user_model import UserModel
from megu_cli.request.deletion_list import has_indices, listed
from megu_cli.request.resolve import Earlier, Request, asked, class_positions, resolve
from megu_cli.run import artifacts, files

Missing = Literal["error", "ignore"]
_LISTS = (".csv", ".tsv", ".txt")
_CONFIGS = (".yaml", ".yml")


class Forgotten(NamedTuple):
    """What a record says: names of concepts, and contents of single images."""

    concepts: tuple[str, ...] = ()
    contents: tuple[int, ...] = ()

    @property
    def words(self) -> str:
        """In words."""
        images = [f"{len(self.contents):,} image{'s' if len(self.contents) > 1 else ''}"] if self.contents else []
        classes = [f"class {name}" for name in self.concepts[:5]]
        more = [f"{len(self.concepts) - 5} more classes"] if len(self.concepts) > 5 else []
        return ", ".join([*images, *classes, *more]) or "nothing"

    @property
    def plain(self) -> dict[str, list[str]]:
        """As it is written: an image is the start of its content's sha256."""
        return {
            "concepts": list(self.concepts),
            "images": [f"{content & (2**64 - 1):016x}" for content in self.contents],
        }


class EarlierRequests:
    """What was forgotten before: what the checkpoint says of itself, and the setting ``forget.already``.

    Args:
        given: The setting, which names run directories, deletion lists and configs; ``None`` where nothing is said, and
            empty where nothing need stay forgotten.
        checkpoint: The user's own, where there is one.
        data: Of this run; ``None`` does not hold that of earlier configs against it.
        within: The configs that led here, from one's ``forget.already`` to the next one's.
        out: The run directory, whose earlier result the checkpoint may be.
        missing: Whether lines and concepts that match nothing are refused.
        records: Further records.
    """

    def __init__(
        self,
        given: Sequence[Path] | None,
        checkpoint: Path | None = None,
        data: DataConfig | None = None,
        within: Sequence[Path] = (),
        out: Path | None = None,
        missing: Missing = "error",
        records: Sequence[Forgotten] = (),
    ) -> None:
        self.given, self.checkpoint, self.data, self.within = given, checkpoint, data, within
        self.out, self.missing, self._records = out, missing, records

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> EarlierRequests:
        """What a `record` tells, for other data."""
        return cls(None, missing="ignore", records=[recorded(record, "the record")])

    @cached_property
    def of_checkpoint(self) -> Forgotten:
        """What the checkpoint's own record says; nothing where it was never unlearned.

        Raises:
            ConfigError: The checkpoint was unlearned, its record is not to be read, and nothing else is said.
            CheckpointError: It cannot be read.
        """
        own = self.checkpoint
        # Without the file nothing is made of it, and what is made of another request has another key.
        if own is None or self.given == [] or not own.exists():
            return Forgotten()
        if (mark := mark_of(own)) is not None:
            try:
                forgotten: Forgotten = _proven(json.loads(mark), str(own))["forgotten"]
                return forgotten
            except (ValueError, RecursionError, DataError):
                if self.given:
                    return Forgotten()
                raise ConfigError(
                    f"the checkpoint {own} was unlearned before, and its record of what was forgotten is damaged",
                    "Set forget.already to the run directories, deletion lists or configs of the earlier requests, or "
                    "to [] if that may be learned again.",
                ) from None
        known = self._known()
        if known and (same := known.keys() & weights_digests(own)):
            return known[min(same)]
        # model.safetensors, model.pth (or whichever suffix the first checkpoint had), the directory model/.
        if self.given is None and own.stem == files.UNLEARNED and (own.parent / files.FINETUNE).is_file():
            raise ConfigError(
                f"the checkpoint {own} was unlearned before, and does not say what it has forgotten",
                f"Set forget.already to [{own.parent}], or to [] if that may be learned again.",
            )
        return Forgotten()

    def _known(self) -> dict[str, Forgotten]:
        """Digest of weights -> what was forgotten, by the run directories that are near or named."""
        own = self.checkpoint
        near = [] if own is None else [own.parent, own.parent.parent]
        folders = [*([self.out] if self.out else []), *near, *self.runs]
        known: dict[str, Forgotten] = {}
        for file in dict.fromkeys(folder / files.FINETUNE for folder in folders):
            try:
                proven = _proven(artifacts.read(file).body.get("provenance"), str(file))
            except (ArtifactError, DataError, OSError):
                continue  # it is of an earlier megu, or the pipeline says what is wrong with it
            known[proven["tensors"]] = proven["forgotten"]
            if proven["before"] != Forgotten():
                known.setdefault(proven["parent"], proven["before"])
        return known

    @cached_property
    def configs(self) -> list[tuple[Config, EarlierRequests]]:
        """The configs among what is given, each with what was forgotten before it.

        Raises:
            ConfigError: One cannot be read, leads back to itself, counts images in other data, or draws them and its
                checkpoint is gone.
        """
        found = []
        for path in self.given or []:
            if path.suffix not in _CONFIGS:
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
            checkpoint = UserModel(config.model, config.data).checkpoint
            if checkpoint is not None and not checkpoint.exists():
                if config.forget.random and config.forget.already != []:
                    raise ConfigError(
                        f"forget.already: {path} draws among what {checkpoint} had not forgotten, and it is gone",
                        "Name the run directory, which says which they were.",
                    )
                checkpoint = None
            before = EarlierRequests(config.forget.already, checkpoint, self.data, chain, config.out, self.missing)
            found.append((config, before))
        return found

    @property
    def runs(self) -> list[Path]:
        """The run directories among what is given."""
        return [path for path in self.given or [] if path.suffix not in (*_LISTS, *_CONFIGS)]

    @property
    def lists(self) -> list[Path]:
        """The deletion lists."""
        own = [path for path in self.given or [] if path.suffix in _LISTS]
        asked = [config.forget.samples for config, _ in self.configs if config.forget.samples]
        return [*own, *asked, *(path for _, before in self.configs for path in before.lists)]

    @property
    def subjects(self) -> list[str]:
        """The people that configs name."""
        asked = [str(person) for config, _ in self.configs for person in config.forget.subjects or []]
        return [*asked, *(person for _, before in self.configs for person in before.subjects)]

    @property
    def contents(self) -> list[int]:
        """Contents of the single images that are recorded."""
        own = [content for record in self.records for content in record.contents]
        return [*own, *(content for _, before in self.configs for content in before.contents)]

    @cached_property
    def records(self) -> list[Forgotten]:
        """What the checkpoint and the run directories have recorded.

        Raises:
            ConfigError: See `of_checkpoint`.
            DataError: There is no record of what was forgotten.
        """
        runs = [
            recorded(artifacts.read(folder / files.FINETUNE).body.get("forgotten"), str(folder)) for folder in self.runs
        ]
        return [*self._records, *([self.of_checkpoint] if self.of_checkpoint != Forgotten() else []), *runs]

    def resolved(self, data: Dataset) -> Earlier:
        """All of it, in a data set. Recorded images that are no longer in the data need no mention.

        Raises:
            MeguError: See `records` and `configs`; or a concept is not in the data, or a list is at fault.
        """
        result = Earlier()
        for forgotten in self.records:
            result = result.joined(of_record(data, *forgotten, missing=self.missing))
        if self.checkpoint is not None and self.of_checkpoint != Forgotten():
            # It is about the checkpoint that is now unlearned further, not about those of earlier configs.
            told = f"the checkpoint was unlearned before; these stay forgotten: {self.of_checkpoint.words}"
            result = result.joined(Earlier(told=(told,)))
        for path in self.given or []:
            if path.suffix in _LISTS:
                result = result.joined(of_list(data, path, self.missing))
        for config, before in self.configs:
            # A random request was drawn from what was not held out then.
            borrowed = config.data.validation_from == "test" and not data.test_made
            there = holding_out(data, 0.0 if borrowed else config.data.validation)
            then = resolve(
                there,
                **asked(config.forget),
                # The draw does not depend on held-out images, and these are others.
                earlier=replace(before.resolved(data), held_out=torch.empty(0, dtype=torch.int64)),
                seed=config.seed,
                missing=self.missing,
            )
            result = result.joined(Earlier(torch.cat([then.forget, then.already]), then.concepts))
        return result


def _counted_in(data: DataConfig) -> dict[str, Any]:
    """What tells that there are other images to count or to draw from."""
    return data.model_dump(include={"name", "limit", "test_fraction"})


def of_record(data: Dataset, concepts: Sequence[str], contents: Sequence[int], missing: Missing = "error") -> Earlier:
    """What a record tells. Images that are no longer in the data need no mention.

    Raises:
        DataError: A concept is not in the data.
    """
    there = {composed(name) for name in data.concepts}
    unknown = [name for name in concepts if composed(name) not in there]
    if unknown and missing == "error":
        raise DataError(
            f"forget.already: {', '.join(unknown[:5])} was forgotten before, and there is no class of this name",
            "Restore the name; or, if its images have left the data, set forget.already_missing: ignore.",
        )
    gone = class_positions([name for name in concepts if name not in unknown], data.concepts)

    def positions(split: Split) -> Tensor:
        mask = torch.isin(split.concepts, torch.tensor(gone, dtype=torch.int64))
        if contents:
            mask |= torch.isin(split.images.contents(), torch.tensor(contents, dtype=torch.int64))
        return torch.where(mask)[0]

    earlier = Earlier(positions(data.train), gone)
    return replace(earlier, held_out=positions(data.held_out)) if data.borrowed else earlier


def of_list(data: Dataset, path: Path, missing: Missing = "error") -> Earlier:
    """What a deletion list tells.

    Raises:
        DataError: The list cannot be read, or lines match nothing.
    """
    found = listed(path, data, "forget.already", missing)
    told = f"forget.already: {len(found.positions):,} of {found.lines:,} lines of {path.name} matched"
    return Earlier(torch.tensor(found.positions, dtype=torch.int64), told=(told,))


def record(data: Dataset, request: Request, before: EarlierRequests | None = None) -> dict[str, list[str]]:
    """What has been forgotten now and before, for a later request to read: nothing of it names an image.

    Images are given by the start of their content's sha256, so that the record holds when files are renamed, and tells
    nothing to who does not have the image. What earlier records say is taken over, also of images that are not in the
    data now: they may come back.
    """
    now = recording(data, Earlier(torch.cat([request.forget, request.already]), request.concepts))
    earlier = before.records if before else []
    concepts = [*now["concepts"], *(name for one in earlier for name in one.concepts)]
    images = [*now["images"], *(image for one in earlier for image in one.plain["images"])]
    return {"concepts": list(dict.fromkeys(concepts)), "images": list(dict.fromkeys(images))}


def recording(data: Dataset, earlier: Earlier) -> dict[str, list[str]]:
    """A `record` of what was forgotten before."""
    contents: set[int] = set()
    for split, positions in ((data.train, earlier.positions), (data.held_out, earlier.held_out)):
        gone = torch.isin(split.concepts[positions], torch.tensor(earlier.concepts, dtype=torch.int64))
        single = positions[~gone]
        if len(single):  # to hash all pixels of a data set in memory takes long
            contents |= {*split.images.contents()[single].tolist()}
    return Forgotten(tuple(data.concepts[c] for c in earlier.concepts), tuple(sorted(contents))).plain


def recorded(content: Any, where: str) -> Forgotten:
    """Concepts and contents of images in a `record`.

    Raises:
        DataError: It is none.
    """
    try:
        unsigned = [int(image, 16) for image in content["images"]]
        if not all(0 <= n < 2**64 for n in unsigned):
            raise ValueError
        return Forgotten(tuple(map(str, content["concepts"])), tuple(n - (n >> 63 << 64) for n in unsigned))
    except (TypeError, KeyError, ValueError):
        raise DataError(f"forget.already: {where} does not say what was forgotten there") from None


def provenance(
    forgotten: Mapping[str, Any],
    before: Forgotten,
    parent: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    request: Sequence[str],
) -> dict[str, Any]:
    """What an unlearned model says of itself, wherever it goes.

    Args:
        forgotten: The `record` of all that it has forgotten.
        before: What the model that it was made from said.
        parent: Weights of that model.
        weights: Its own weights.
        request: Digests of the training data and of the request; together they tell nothing without the data.
    """
    body = {
        "forgotten": dict(forgotten),
        "before": before.plain,
        "parent": weights_digest(parent.values()),
        "tensors": weights_digest(weights.values()),
        "request": artifacts.digest(list(request)),
        "megu": __version__,
    }
    return {**body, "checksum": artifacts.digest(body)}


def _proven(content: Any, where: str) -> dict[str, Any]:
    """A `provenance`, with its records read.

    Raises:
        DataError: It is none, or damaged.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where} holds no record")
    body = {key: value for key, value in content.items() if key != "checksum"}
    if content.get("checksum") != artifacts.digest(body):
        raise DataError(f"{where}: the record is damaged")
    parts = {key: recorded(body.get(key), where) for key in ("forgotten", "before")}
    return {**parts, **{key: str(body.get(key)) for key in ("parent", "tensors")}}
