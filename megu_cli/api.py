"""The Python interface: unlearn a module that is in memory, with data that are."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from megu_cli import training
from megu_cli.config import FinetuneConfig, LabelsConfig, NoiseConfig, Section, TransitionConfig, section
from megu_cli.data import Dataset, Split
from megu_cli.errors import ConfigError, DataError
from megu_cli.execution import Execution
from megu_cli.execution.runtime import Track, silent
from megu_cli.method import nearness
from megu_cli.method import unlearn as unlearning
from megu_cli.method.unlearn import Labels, UnlearningProblem
from megu_cli.mllm.base import SCALE, Question
from megu_cli.mllm.recorded import Recorded
from megu_cli.request.resolve import Request
from megu_cli.training import History

Samples = TorchDataset[Any] | tuple[Tensor, Tensor]
Scores = Mapping[str, Mapping[str, float]]
_SECTIONS: dict[str, type[Section]] = {
    "transition": TransitionConfig,
    "labels": LabelsConfig,
    "noise": NoiseConfig,
    "finetune": FinetuneConfig,
}


@dataclass(frozen=True)
class Unlearned:
    """What `unlearn` makes.

    Attributes:
        model: The unlearned module, a copy of the original in eval mode.
        labels: Perturbing labels of the forgotten samples, in their order.
        transition: (A, K) transition matrix; a row for each class that has forgotten samples, in order of the class.
        noise: The noise pair: ``positive`` and ``negative``, as far as they are in use, with their ``*_class``.
        history: Loss and validation accuracy of the finetuning.
    """

    model: nn.Module
    labels: Labels
    transition: Tensor
    noise: dict[str, Tensor]
    history: History


def unlearn(
    model: nn.Module,
    *,
    retain: Samples,
    forget: Samples,
    similarity: Scores | Tensor | Sequence[Sequence[float]] | Path | str | None = None,
    validation: Samples | None = None,
    classes: Sequence[str] | None = None,
    forgotten: Sequence[str | int] | None = None,
    seed: int = 0,
    settings: Mapping[str, Section | Mapping[str, Any]] | None = None,
    workers: int = 0,
    track: Track = silent,
) -> Unlearned:
    """Make a copy of a classifier forget: the same four steps as `megu run`, with the same settings and draws.

    Args:
        model: The trained classifier: images (B, C, H, W) in, logits (B, K) out. It is not changed; the work is done
            on its device, and on all parameters of the copy, frozen ones among them.
        retain: What is kept: a Dataset of (image, label), or (images, labels) as tensors. Images are floats (C, H, W),
            normalised as the model takes them, and without random augmentation if the same seed is to give the same
            result. A Dataset is gone through once for its labels.
        forget: What is to be forgotten, in the same form.
        similarity: How similar the forgotten classes' concepts are to the others, from 0 to 10: class -> class ->
            rating; or (K, K) ratings, of which only the forgotten classes' rows are looked at; or the path of a file of
            recorded ratings, such as a similarity.json. ``None``: every class is as near as any other, so that
            labels follow the proxy and the model's own prediction alone. With ``transition.from: confusions`` or
            ``embeddings`` it is left out.
        validation: Held-out samples that the model was not trained on, of retained classes at least. With them the
            finetuning can stop early, and ``labels.keep: auto`` has something to look at, which single images of
            kept classes need.
        classes: Names of the K classes; without them they are called "0" to "K-1".
        forgotten: Classes that are wholly forgotten, by name or index; without it those with no retained sample.
        seed: Of everything random.
        settings: Sections ``transition``, ``labels``, ``noise`` and ``finetune``, as in the config file: a mapping of
            settings each, or an object such as `FinetuneConfig`. What is not given has its default.
        workers: Processes that read from Datasets.
        track: Reports progress.

    Raises:
        ConfigError: A setting or an argument is at fault.
        DataError: Samples or ratings are at fault.
    """
    device = next(model.parameters()).device
    parts = [_Part(retain, "retain"), _Part(forget, "forget")]
    if validation is not None:
        parts.append(_Part(validation, "validation"))
    changed = copy.deepcopy(model).requires_grad_(True).eval()
    names = _names(classes, changed, parts[0])
    data = _dataset(parts, names, workers)
    sizes = [len(part.labels) for part in parts]
    problem = UnlearningProblem(
        data=data,
        request=_request(data, sizes, forgotten),
        **_sections(settings or {}),
        execution=Execution(device, seed, training.eval_batch(parts[0].image(0).shape[-2:], device), track=track),
    )
    matrix = _matrix(problem, changed, similarity)
    chosen = unlearning.perturb(problem, changed, matrix)
    pair = unlearning.noise_pair(problem, changed, chosen)
    history = unlearning.align(problem, changed, matrix, chosen, pair).history
    unlearning.calibrate(problem, changed, chosen)
    for ours, own in zip(changed.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(own.requires_grad)
        ours.grad = None
    return Unlearned(changed, chosen, matrix, pair, history)


def _matrix(problem: UnlearningProblem, model: nn.Module, similarity: Any) -> Tensor:
    """The transition matrix, from ratings or from the model.

    Raises:
        ConfigError: Ratings are given where none are taken.
        DataError: They are not complete, or not from 0 to 10.
    """
    source = problem.transition.source
    if source == "ratings":
        candidates = _candidates(problem)
        scores = _scores(similarity, candidates, problem.data.classes)
        return unlearning.transition(problem, candidates, scores)
    if similarity is not None:
        raise ConfigError(
            f"similarity: ratings are given, and transition.from: {source} takes none",
            "Leave similarity out, or set transition.from: ratings.",
        )
    return nearness.transition(problem, model)


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The method's sections of the config, validated, by name."""
    if unknown := settings.keys() - _SECTIONS.keys():
        raise ConfigError(
            f"settings: unknown section {', '.join(sorted(map(str, unknown)))}",
            f"The sections are {', '.join(_SECTIONS)}.",
        )
    return {name: section(kind, name, settings.get(name)) for name, kind in _SECTIONS.items()}


class _Part:
    """Samples under the name of their argument, with their labels."""

    def __init__(self, given: Samples, name: str) -> None:
        self.name = name
        self.images: Any = given
        if isinstance(given, tuple):
            self.images, labels = given
            self.labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
            if len(self.images) != len(self.labels):
                raise DataError(f"{name}: {len(self.images)} images and {len(self.labels)} labels")
        else:
            self.labels = torch.tensor([int(given[i][1]) for i in range(len(cast(Any, given)))], dtype=torch.int64)
        if not len(self.labels):
            raise DataError(f"{name} is empty")
        first = self.image(0)
        if first.ndim != 3 or not first.is_floating_point():
            raise DataError(
                f"{name}: its images are {str(first.dtype).removeprefix('torch.')} {tuple(first.shape)}",
                "They are to be floats (C, H, W), normalised as the model takes them.",
            )

    def image(self, position: int) -> Tensor:
        """(C, H, W) as it was given."""
        found = self.images[position]
        return torch.as_tensor(found[0] if isinstance(found, (tuple, list)) else found)


class _Floats:
    """Images of several parts behind one row of positions; as `data.Images`, but normalised floats."""

    def __init__(self, parts: Sequence[_Part], workers: int) -> None:
        self.parts, self.workers = parts, workers
        self._ends = list(accumulate(len(part.labels) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> Tensor:
        part = bisect_right(self._ends, position)
        return self.parts[part].image(position - (self._ends[part - 1] if part else 0))

    def batches(self, order: Sequence[Tensor]) -> Iterable[Tensor]:
        """One float tensor (B, C, H, W) for each tensor of positions in ``order``."""
        loader: DataLoader[Tensor] = DataLoader(
            cast(Any, self),
            batch_sampler=[index.tolist() for index in order],
            num_workers=self.workers,
            collate_fn=torch.stack,
            generator=torch.Generator(),  # of its own: by default it would draw from the stream that dropout draws from
        )
        return iter(loader)

    def at(self, index: Tensor) -> _Floats:
        """Not needed here."""
        raise NotImplementedError

    def contents(self) -> Tensor:
        """(N,) all different: which samples are copies of each other is the caller's to say."""
        return torch.arange(len(self))


class _Given(Split):
    """A split whose images are normalised already."""

    def batches(self, order: Sequence[Tensor], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Images (B, C, H, W) as they were given, channels_last, for each tensor of positions in ``order``."""
        for x in self.images.batches(order):
            yield x.to(device, torch.float32).contiguous(memory_format=torch.channels_last)


def _names(classes: Sequence[str] | None, model: nn.Module, part: _Part) -> list[str]:
    """Names of the K classes that the model predicts.

    Raises:
        ConfigError: They are not as many, or not different.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        number = model(part.image(0)[None].to(device, torch.float32)).shape[-1]
    names = [str(k) for k in range(number)] if classes is None else [str(name) for name in classes]
    if len(names) != number:
        raise ConfigError(f"classes: {len(names)} names, and the model predicts {number} classes")
    if len(set(names)) < len(names):
        raise ConfigError("classes: a name stands there twice")
    return names


def _dataset(parts: Sequence[_Part], names: list[str], workers: int) -> Dataset:
    """The data set of these parts: ``retain`` and ``forget`` are its training split, ``validation`` is held out.

    There is no test split.
    """
    labels = torch.cat([part.labels for part in parts])
    wrong = labels[(labels < 0) | (labels >= len(names))]
    if len(wrong):
        raise DataError(f"label {int(wrong[0])} is none of the {len(names)} classes of the model")
    train = _split(parts[:2], workers)
    held_out = _split(parts[2:], workers) if len(parts) > 2 else train.view(torch.empty(0, dtype=torch.int64))
    nowhere = torch.empty(0, dtype=torch.int64)
    return Dataset("given", names, names, torch.arange(len(names)), train, held_out, train, nowhere)


def _split(parts: Sequence[_Part], workers: int) -> Split:
    """All samples, part after part."""
    labels = torch.cat([part.labels for part in parts])
    channels = parts[0].image(0).shape[0]
    identity = [f"{part.name}/{i}" for part in parts for i in range(len(part.labels))]
    zero, one = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    return _Given(_Floats(parts, workers), labels, labels, identity, zero, one, "")


def _request(data: Dataset, sizes: Sequence[int], forgotten: Sequence[str | int] | None) -> Request:
    """The request that the three parts of the samples stand for.

    Raises:
        ConfigError: A class to forget is unknown, or has retained samples, or too few are left.
    """
    places = torch.arange(sum(sizes[:2])).split(list(sizes[:2]))
    gone = data.train.labels[places[1]].unique()
    kept = data.train.labels[places[0]].unique().tolist()
    if forgotten is None:
        classes = [c for c in gone.tolist() if c not in kept]
    else:
        known = {name: i for i, name in enumerate(data.classes)} | {i: i for i in range(len(data.classes))}
        unknown = [repr(name) for name in forgotten if name not in known]
        if unknown:
            raise ConfigError(f"forgotten: there is no class {', '.join(unknown)}")
        classes = sorted({known[name] for name in forgotten})
        if both := [data.classes[c] for c in classes if c in kept]:
            raise ConfigError(f"forgotten: retain holds samples of {', '.join(both)}")
    if len(data.classes) - len(classes) < 2:
        raise ConfigError(f"{len(data.classes) - len(classes)} of {len(data.classes)} classes would remain, not two")
    whole = torch.isin(gone, torch.tensor(classes, dtype=torch.int64)).all()
    # Accuracy on classes to forget is no criterion for a selection.
    seen = ~torch.isin(data.held_out.labels, torch.tensor(classes, dtype=torch.int64))
    return Request(
        kind="classes" if whole else "samples",
        forget=places[1],
        retain=places[0],
        validation=torch.where(seen)[0],
        classes=classes,
        concepts=classes,
        asked=gone.tolist(),
    )


def _candidates(problem: UnlearningProblem) -> dict[str, list[str]]:
    """Class with forgotten samples -> the classes that it is compared with."""
    names, request = problem.data.classes, problem.request
    remain = [k for k in range(len(names)) if k not in request.classes]
    return {names[c]: [names[k] for k in remain if k != c] for c in request.asked}


def _scores(given: Any, candidates: Mapping[str, Sequence[str]], names: Sequence[str]) -> Scores:
    """Ratings by name.

    Raises:
        DataError: They are not complete, or not from 0 to 10.
    """
    if given is None:
        return {concept: dict.fromkeys(compared, 0.0) for concept, compared in candidates.items()}
    if isinstance(given, (str, Path)):
        questions = [Question(concept, list(compared), []) for concept, compared in candidates.items()]
        return Recorded(Path(given)).rate(questions).scores
    if isinstance(given, Mapping):
        scores: Scores = given
    else:
        table = torch.as_tensor(given, dtype=torch.float64)
        if table.shape != (len(names), len(names)):
            raise DataError(f"similarity: it is {tuple(table.shape)}, not one row and one column for each class")
        scores = {
            concept: dict(zip(names, table[names.index(concept)].tolist(), strict=True)) for concept in candidates
        }
    low, high = SCALE
    for concept, compared in candidates.items():
        for candidate in compared:
            rating = scores.get(concept, {}).get(candidate)
            if rating is None or not low <= rating <= high:
                raise DataError(
                    f"similarity: the rating of {candidate!r} for {concept!r} is {rating}, "
                    f"not a number from {low:g} to {high:g}"
                )
    return scores
