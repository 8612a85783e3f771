"""What a computation runs on: devices, random streams, and the reporting of progress.

Randomness is a function of (seed, path) alone, such as ``(seed, "finetune", epoch, "strength")``, never of the
order in which things run: a stage draws the same alone, inside ``megu run``, and in any process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Track(Protocol):
    """Reports how far a piece of work is; the command line shows a bar, a library call nothing."""

    def __call__(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """A context for ``total`` units of work under the name ``label``; call what it gives once per unit."""


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Report nothing."""
    yield lambda: None


def derive(seed: int, *path: object) -> int:
    """A 63-bit seed that depends on every part of ``path`` and on nothing else."""
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: object) -> torch.Generator:
    """A CPU random generator for one purpose; draws are made on the CPU so that devices agree."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *path))


@contextlib.contextmanager
def seeded(seed: int, *path: object) -> Iterator[None]:
    """Seed torch's global generators (initialisation, dropout) for a block, and restore them after it."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, *path))
        yield


def draws_so_far(device: torch.device) -> list[torch.Tensor]:
    """Where torch's global generators stand that a computation on ``device`` draws from."""
    import torch

    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def draws_on(states: list[torch.Tensor], device: torch.device) -> None:
    """Set torch's global generators to where they stood at a `draws_so_far` on the same kind of device."""
    import torch

    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


def resolve_device(name: str) -> torch.device:
    """The torch device that ``auto|cpu|cuda|mps`` means here.

    Raises:
        ConfigError: The device asked for is not there.
    """
    import torch

    from megu_cli.errors import ConfigError

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        raise ConfigError(
            f"device {name} is not available here", f"Available: {', '.join(d for d in there if there[d])}."
        )
    return torch.device(name)


def deterministic() -> None:
    """Let torch choose deterministic algorithms wherever it has them."""
    import torch

    # What use_deterministic_algorithms(True, warn_only=True) does, without its import of the compiler: two seconds.
    torch.set_deterministic_debug_mode("warn")
    # By default every new tensor is then filled with NaN before it is written: 8% of a profiled training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def available_cores() -> int:
    """Return the number of cores that this process may use: by its affinity and by the limit of its container."""
    from joblib.externals import loky  # joblib's own count is 1 wherever it cannot start processes

    return int(loky.cpu_count())


def limit_threads() -> None:
    """Let torch compute with no more threads than there are cores, unless ``OMP_NUM_THREADS`` says otherwise.

    torch starts one for each core of the machine, also in a container that may use two of 64: they wait for each other.
    """
    import torch

    cores = available_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


_precision = "auto"


def use_precision(name: str) -> None:
    """Set the precision of training steps in this process: ``auto``, ``float32`` or ``bfloat16``; see `autocast`."""
    global _precision
    _precision = name


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The precision of a training step: float32, or bfloat16 where it loses little.

    ``auto`` is bfloat16 on a CUDA device that has it, and float32 elsewhere. bfloat16 has float32's range, so that no
    loss needs scaling, as it would with float16. Weights, optimizer, noises and evaluation stay in float32.
    """
    import torch

    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    wanted = _precision == "bfloat16" or (_precision == "auto" and able)
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def machine() -> str:
    """A short name of what computes here, so that times of different machines are not set in relation."""
    import torch

    from megu_cli.execution.processes import world

    several = f", {world()} processes" if world() > 1 else ""
    # Not platform.processor(), which starts the program uname.
    return f"{platform.node()} {platform.machine()} {torch.get_num_threads()} threads{several}"
