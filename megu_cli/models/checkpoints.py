"""Checkpoint files: the weights are found however they are wrapped, and go back wrapped the same way.

A training script rarely saves a bare state dict: the weights stand under ``model`` or ``state_dict``, their keys begin
with ``module.`` or ``_orig_mod.``, and an averaged copy, the optimizer's moments and the epoch stand beside them. All
that was learned in such a file remembers what is to be forgotten, not only the weights that are used.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megu_cli.errors import CheckpointError, brief
from megu_cli.models.weights import State, names_of_tensors

Place = tuple[Any, ...]

# What the weights are usually called, the first first.
_USUAL = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
# What a copy that was averaged over training is usually called: EMA and its kin.
_AVERAGED = {"ema", "swa", "averaged", "average", "avg", "shadow", "teacher", "momentum", "target", "best", "last"}
# What a file may keep beside tensors: nothing of this can hold weights.
_PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)
# Floats that torch computes with; float8 and smaller are for storage.
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Levels of containers in a file, and how often a container may be met again: what is shared multiplies the walk.
_DEEPEST = 64
_MOST_SHARED = 10_000
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|model\.|net\.|network\.)+")


@dataclass(frozen=True)
class Copy:
    """One copy of a model's weights in a file.

    Attributes:
        at: Keys that lead to the mapping that holds it; empty: the file is that mapping.
        prefix: What all of its keys begin with.
    """

    at: Place
    prefix: str

    @property
    def name(self) -> str:
        """As in ``model.key``: ``state_dict``, ``module`` (a prefix), ``state_dict.module``; empty for a bare one."""
        return ".".join([*map(str, self.at), *([self.prefix.removesuffix(".")] if self.prefix else [])])


@dataclass(frozen=True)
class Renewed:
    """What becomes of a file once its model is unlearned.

    Attributes:
        content: As the input file has it, with the unlearned weights, and without anything else that was learned.
        replaced: Names of the copies that took the unlearned weights.
        dropped: What was left out, in words.
    """

    content: Any
    replaced: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, taken apart.

    Attributes:
        state: The weights, by the model's own names.
        chosen: Where they stand.
        copies: All copies of the model's weights in the file, ``chosen`` being one of them.
        content: The whole file.
        suffix: Of the file: ``.safetensors``, or what torch wrote.
    """

    state: State
    chosen: Copy
    copies: tuple[Copy, ...]
    content: Any
    suffix: str

    @property
    def bare(self) -> bool:
        """Whether the file is a state dict and nothing else."""
        return self.chosen == Copy((), "") and self.content.keys() == self.state.keys()

    @property
    def described(self) -> dict[str, Any]:
        """What of the file, beside the weights, decides what is written: as plain data."""
        layout = [[list(place), type(value).__name__, _shown(value)] for place, value in _leaves(self.content)]
        return {"suffix": self.suffix, "chosen": self.chosen.name, "layout": layout}

    def renewed(self, state: State) -> Renewed:
        """The file's content with the unlearned weights.

        Every copy of the weights is replaced, in its own dtypes. Every other tensor is dropped, but for counters
        (integers without dimensions); of an optimizer only the settings stay. Plain data stay.

        Args:
            state: The unlearned weights by the model's own names; tied ones share memory.
        """
        of = {
            (*copy.at, copy.prefix + name): value for copy in self.copies for name, value in state.items()
        }  # fmt: skip
        casts: dict[tuple[int, torch.dtype], Tensor] = {}

        def fitting(value: Tensor, old: Tensor) -> Tensor:
            # One tensor for each memory and dtype, so that what was tied stays tied.
            return casts.setdefault((value.data_ptr(), old.dtype), value.detach().cpu().to(old.dtype).contiguous())

        dropped: list[Place] = []

        def renew(value: Any, place: Place) -> Any:
            if isinstance(value, Tensor):
                if place in of:
                    return fitting(of[place], value)
                if value.ndim == 0 and not (value.is_floating_point() or value.is_complex()):
                    return value
            elif isinstance(value, Mapping):
                if "param_groups" in value and "state" in value:
                    dropped.extend((*place, "state", *inner) for inner, _ in _leaves(value["state"]))
                    value = {**value, "state": {}}
                kept = {key: new for key, item in value.items() if (new := renew(item, (*place, key))) is not _GONE}
                return _mapping_like(value, kept)
            elif isinstance(value, (list, tuple, set)) and not isinstance(value, torch.Size):
                items = [renew(item, (*place, i)) for i, item in enumerate(value)]
                kind = _InOrder if isinstance(value, set) else type(value)
                return kind(item for item in items if item is not _GONE)
            elif isinstance(value, _PLAIN):
                return value
            dropped.append(place)
            return _GONE

        content = renew(self.content, ())
        return Renewed(content, [copy.name or "the weights" for copy in self.copies], _summary(dropped))

    def written(self, state: State) -> bytes:
        """The bytes of a torch file with the unlearned weights, wrapped as the input file is; see `renewed`."""
        stream = io.BytesIO()
        torch.save(self.renewed(state).content, stream)
        return stream.getvalue()


_GONE = object()


class _InOrder(set[Any]):
    """A set that is pickled in order, as a plain set: otherwise the bytes of a file would follow the hash seed."""

    def __reduce__(self) -> tuple[type[set[Any]], tuple[list[Any]]]:
        return set, (sorted(self, key=repr),)


def read(path: Path, model: nn.Module, key: str | None = None) -> Checkpoint:
    """Read a checkpoint and find the model's weights in it; no pickled code is ever run.

    Args:
        path: A .safetensors file, or one that ``torch.save`` wrote.
        model: Tells by its names and shapes which of the tensors are its weights.
        key: Which copy to take where there are several: the key that it stands under, or what its keys begin with;
            ``None``: the one that is no average, such as EMA.

    Raises:
        CheckpointError: The file is missing, damaged, needs code to be run, or holds no weights.
    """
    content = content_of(path)
    _check(path, content)
    names = names_of_tensors(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    holders = [(at, mapping) for at, mapping in mappings(content) if any(map(is_tensor, mapping.values()))]
    copies = sorted((c for at, mapping in holders for c in _copies(at, mapping, names, shapes)), key=_preference)
    if key is not None:
        wanted = [c for c in copies if key in (c.name, ".".join(map(str, c.at)), c.prefix.removesuffix("."))]
        if not wanted:
            there = ", ".join(c.name or "the file itself" for c in copies) or "none"
            raise CheckpointError(
                f"model.key: {path.name} holds no weights of this model under {brief(key)}", f"There are: {there}."
            )
    else:
        wanted = copies
    if wanted:
        chosen = wanted[0]
        mapping = dict(holders)[chosen.at]
        others = {c.prefix + name for c in copies if c.at == chosen.at and c != chosen for name in shapes}
        state = {
            name.removeprefix(chosen.prefix): value
            for name, value in mapping.items()
            # What begins likewise and is not the model's is told as unexpected by `models.load_state`.
            if is_tensor(value) and name.startswith(chosen.prefix) and name not in others
        }
        return _usable(path, Checkpoint(state, chosen, tuple(copies), content, path.suffix))
    return _misfit(path, content, holders)


def _misfit(path: Path, content: Any, holders: list[tuple[Place, Mapping[Any, Any]]]) -> Checkpoint:
    """The likeliest weights of a file that holds no complete copy, so that `models.load_state` can say what differs.

    Raises:
        CheckpointError: There is nothing like weights in it.
    """
    states = [
        (at, mapping)
        for at, mapping in holders
        if not any("optim" in str(part).lower() for part in at) and all(isinstance(name, str) for name in mapping)
    ]
    if not states:
        raise CheckpointError(
            f"{path} is no plain state dict (name -> tensor), and holds none",
            "Save model.state_dict() alone, and name that file.",
        )
    at, mapping = min(states, key=lambda pair: _preference(Copy(pair[0], "")))
    state = {name: value for name, value in mapping.items() if is_tensor(value)}
    prefixes = {match.group() if (match := _PREFIX.match(name)) else "" for name in state}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    copy, weights = Copy(at, prefix), {name.removeprefix(prefix): value for name, value in state.items()}
    return _usable(path, Checkpoint(weights, copy, (copy,), content, path.suffix))


def content_of(path: Path) -> Any:
    """What stands in a checkpoint file; no pickled code is run.

    Raises:
        CheckpointError: The file is missing, damaged, or needs code to be run.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", "Set model.checkpoint, or make one with `megu train`.")
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return dict(safetensors.torch.load_file(path))
        except Exception as error:  # safetensors raises its own SafetensorError, which it does not export everywhere
            raise CheckpointError(f"{path} is damaged, truncated or no safetensors file: {error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except Exception as error:  # torch.load raises RuntimeError, EOFError, OSError and more for damaged files
        why = (str(error) or "it is empty").splitlines()[0]  # an empty file is an EOFError that says nothing
        raise CheckpointError(f"{path} is damaged or truncated: {why}") from None


def _refused(path: Path, message: str) -> CheckpointError:
    """What a pickle needs that is no tensor, and how to convert the file."""
    try:
        needed = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or a bare pickle
        needed = re.findall(r"GLOBAL ([\w.]+)", message)[:1]
    told = ", ".join(needed[:5]) + (", …" if len(needed) > 5 else "") or "it may be damaged"
    whole = any(name.startswith("torch.nn.modules") for name in needed)
    load = f"torch.load({path.name!r}, map_location='cpu', weights_only=False)"
    if whole:
        lines = [f"torch.save({load}.state_dict(), 'weights.pth')"]
    else:
        lines = [f"c = {load}"]
        if "argparse.Namespace" in needed:
            lines.append("c = {k: vars(v) if type(v).__name__ == 'Namespace' else v for k, v in c.items()}")
        if any(name.startswith("numpy") for name in needed):
            lines.append("c = {k: v.tolist() if type(v).__module__ == 'numpy' else v for k, v in c.items()}")
        if len(lines) == 1:
            lines.append("c = c.get('state_dict', c)  # the weights alone, under whichever key they stand")
        lines.append("torch.save(c, 'converted.pth')")
    script = "\n".join(f"  {line}" for line in ["import torch", *lines])
    return CheckpointError(
        f"{path} holds more than tensors and plain data; it was not loaded, since code would have to be run ({told})",
        f"If you trust the file, convert it where it was made:\n{script}",
    )


def _check(path: Path, content: Any) -> None:
    """Refuse a file that cannot be walked through: one that contains itself, or has keys that are no plain data.

    Raises:
        CheckpointError: It is such a file; the place is named.
    """
    left: list[tuple[Place, Any]] = [((), content)]
    seen: set[int] = set()
    shared = 0

    def refusal(what: str, hint: str = "Save model.state_dict() alone.") -> CheckpointError:
        return CheckpointError(f"{path} {what}", hint)

    while left:
        place, value = left.pop()
        if isinstance(value, (Mapping, list, tuple)) and len(value):
            shared += id(value) in seen
            seen.add(id(value))
        # A few lists that hold each other twice can be more to walk through than there is time.
        if len(place) > _DEEPEST or shared > _MOST_SHARED:
            raise refusal(f"contains itself, or is nested too deeply, at {_where(place)[:60]}…")
        if isinstance(value, int) and not _plain_key(value):
            raise refusal(f"holds a number of too many digits at {_where(place)}", "Save it as text.")
        if isinstance(value, Tensor) and value.is_nested:
            raise refusal(f"holds a nested tensor at {_where(place)}")
        if isinstance(value, Mapping):
            for key in value:
                if not _plain_key(key):
                    where = f"{_where(place)}: {type(key).__name__} {key!r:.60}"
                    raise refusal(f"holds a key that is no text or number at {where}")
            left += [((*place, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [
                ((*place, i), item) for i, item in enumerate(value) if isinstance(item, (Mapping, list, tuple, int))
            ]


def _where(place: Place) -> str:
    """A place in a file, in words."""
    return ".".join(map(str, place)) or "the top"


def _plain_key(key: Any) -> bool:
    """True if a key can be a part of a digest."""
    if isinstance(key, str):
        return key.isprintable() or not any("\ud800" <= character <= "\udfff" for character in key)
    if isinstance(key, float):
        return math.isfinite(key)
    if isinstance(key, int):
        return key.bit_length() < 10_000  # Python writes no longer ones
    return key is None or (isinstance(key, tuple) and all(map(_plain_key, key)))


def _usable(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if its weights are dense tensors of numbers that torch computes with.

    Raises:
        CheckpointError: One is not; it is named.
    """
    for name, value in checkpoint.state.items():
        kind = ""
        if value.is_meta:
            kind = "is a meta tensor, which has no values"
        elif value.is_quantized:
            kind = f"is quantised ({value.dtype})"
        elif value.layout != torch.strided:
            kind = f"is sparse ({value.layout})"
        elif value.is_floating_point() and value.dtype not in _COMPUTED:
            kind = f"has the dtype {value.dtype}, with which torch does not compute"
        if kind:
            at = ".".join([*map(str, checkpoint.chosen.at), checkpoint.chosen.prefix + name])
            raise CheckpointError(f"{path}: {at} {kind}", "Save the weights as dense tensors, such as float32.")
    return checkpoint


def is_tensor(value: Any) -> bool:
    """Whether a value in a file is a tensor."""
    return isinstance(value, Tensor)


def mappings(content: Any, at: Place = ()) -> Iterator[tuple[Place, Mapping[Any, Any]]]:
    """Every mapping in a file, with the keys that lead to it."""
    if isinstance(content, Mapping):
        yield at, content
        for key, value in content.items():
            yield from mappings(value, (*at, key))


def _leaves(content: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything in a file that is no container, with the keys that lead to it."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, (*place, key))
    elif isinstance(content, (list, tuple)) and not isinstance(content, torch.Size):
        for i, value in enumerate(content):
            yield from _leaves(value, (*place, i))
    else:
        yield place, content


def _copies(
    at: Place, mapping: Mapping[Any, Any], names: list[list[str]], shapes: Mapping[str, torch.Size]
) -> list[Copy]:
    """The complete copies of a model's weights in one mapping: one for each prefix."""
    tensors = {key: value for key, value in mapping.items() if isinstance(key, str) and is_tensor(value)}
    longest = max(names, key=lambda group: len(group[0]), default=[])
    prefixes = {
        key.removesuffix(name)
        for name in longest for key in tensors if key == name or key.endswith(f".{name}")
    }  # fmt: skip

    def complete(prefix: str) -> bool:
        return all(
            any(f"{prefix}{name}" in tensors and tensors[f"{prefix}{name}"].shape == shapes[name] for name in group)
            for group in names
        )

    return [Copy(at, prefix) for prefix in sorted(prefixes) if complete(prefix)]


def _preference(copy: Copy) -> tuple[bool, int, int, str]:
    """The sorting key of copies: averages last, then by how usual the name is."""
    words = set(re.split(r"[._]", copy.name.lower()))
    usual = [_USUAL.index(part) if part in _USUAL else len(_USUAL) for part in map(str, copy.at)]
    return bool(words & _AVERAGED), min(usual, default=0), len(copy.name), copy.name


def _mapping_like(old: Mapping[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """A mapping of the same kind, with torch's own note on a state dict (its ``_metadata``)."""
    if isinstance(old, OrderedDict):
        new: dict[Any, Any] = OrderedDict(items)
        if hasattr(old, "_metadata"):
            new._metadata = old._metadata  # type: ignore[attr-defined]
        return new
    return Counter(items) if isinstance(old, Counter) else items


def _summary(places: list[Place]) -> list[str]:
    """Places in words: what lies close together is counted."""
    groups: dict[str, list[str]] = {}
    for place in places:
        groups.setdefault(".".join(map(str, place[:-1][:2])), []).append(".".join(map(str, place)))
    told = []
    for group, full in groups.items():
        told += full if len(full) <= 2 or not group else [f"{group}: {len(full)} tensors"]
    return told


def _shown(value: Any) -> Any:
    """A value as a part of a digest: it must not follow the hash seed, as the order of a set does."""
    if isinstance(value, (set, frozenset)) and value:
        return "{" + ", ".join(sorted(map(str, map(_shown, value)))) + "}"
    return list(value.shape) if isinstance(value, Tensor) else repr(value)
