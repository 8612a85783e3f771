"""Workers of a comparison that are tasks of a cluster, by submitit: each task computes one cell."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megu_cli.compare.arena import Say
from megu_cli.compare.cells import Cells
from megu_cli.compare.jobs import Ended, Opened, computed
from megu_cli.errors import ConfigError, MeguError, brief
from megu_cli.execution.runtime import available_cores
from megu_cli.run import files, writing

# A task may take so long unless an option gives another limit; submitit's own default is five minutes.
_MINUTES = 60
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Kind:
    """Values that an option takes.

    Attributes:
        accepts: True if a value is of this kind.
        description: The kind in words.
        example: Such a value as one writes it in a shell.
    """

    accepts: Callable[[Any], bool]
    description: str
    example: str


def _is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_lines(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


# Options that submitit does not check, or refuses in words that do not help. Their names may begin with a cluster's.
_KINDS = {
    "timeout_min": _Kind(_is_positive, "a whole number of minutes above 0", "120"),
    "cpus_per_task": _Kind(_is_positive, "a whole number of cores above 0", "4"),
    "setup": _Kind(_is_lines, "a list of shell lines", "'[module load cuda]'"),
    "additional_parameters": _Kind(
        lambda value: isinstance(value, dict), "a mapping of sbatch's options", "'{reservation: mine}'"
    ),
}


class ClusterWorkers:
    """Tasks that each compute one cell, submitted as arrays. See `Workers`.

    Args:
        cells: The cells. All machines share their run directory.
        opened: Makes the same cells in a task.
        say: Called with a line for each cell that is submitted, and with the lines of each cell that is done.
        force: Compute again what is there.
        cluster: An executor of submitit: ``slurm``, or ``local`` for processes of this machine.
        options: Parameters of the executor, such as ``slurm_partition``, ``timeout_min`` and ``cpus_per_task``.
        number: Tasks at a time at most; ``None``: on this machine one for each core
            that this process may use, else as many as the cluster runs.

    Raises:
        ConfigError: submitit is not installed, or there is no such cluster or option.
    """

    advice = "Give the tasks more memory or time, such as --cluster-option mem_gb=16 --cluster-option timeout_min=240."

    def __init__(
        self,
        cells: Cells,
        opened: Opened,
        say: Say,
        force: bool,
        *,
        cluster: str,
        options: Mapping[str, Any],
        number: int | None = None,
    ) -> None:
        self.out, self.opened, self.say, self.force = cells.out, opened, say, force
        self.number = number or (available_cores() if cluster == "local" else None)
        self.folder = writing.temporary_folder(self.out / files.COMPARE_FOLDER)
        self._jobs: dict[str, Any] = {}
        try:
            self._executor = _executor(self.folder, cluster, options)
        except ConfigError:
            self.close()
            raise

    def start(self, ready: Sequence[str], failures: Mapping[str, str]) -> list[str]:
        """Submit the cells as an array. See `Workers.start`."""
        from submitit.core.utils import FailedJobError

        begun = list(ready) if self.number is None else list(ready[: self.number - len(self._jobs)])
        if not begun:
            return []
        task = partial(_compute, self.out, self.opened, dict(failures), self.force)
        try:
            jobs = self._executor.map_array(task, begun)
        except FailedJobError as error:
            _, _, reason = str(error).strip().rpartition("\n")
            raise MeguError(f"--cluster: the tasks cannot be submitted: {reason}", "Check --cluster-option.") from None
        for name, job in zip(begun, jobs, strict=True):
            self._jobs[name] = job
            self.say(f"{name}: submitted as {job.job_id}")
        return begun

    def ended(self) -> list[Ended]:
        """See `Workers.ended`."""
        while not (done := [name for name, job in self._jobs.items() if job.done()]):
            time.sleep(_POLL_SECONDS)
        return [self._result(name, self._jobs.pop(name)) for name in done]

    def close(self) -> None:
        """Cancel the tasks, and delete what submitit wrote."""
        for job in self._jobs.values():
            job.cancel(check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # empty, where nothing was computed

    def _result(self, name: str, job: Any) -> Ended:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        ended: Ended
        try:
            ended, lines = job.result()
        except FailedJobError:  # not the cell's: that machine has no data, or another version of megu
            _, _, reason = (job.stderr() or "").strip().rpartition("\n")
            return Ended(name, death=f"its task failed ({reason})")
        except UncompletedJobError:
            return Ended(name, death=f"its task ended without a result (state {job.state})")
        for line in lines:
            self.say(line)
        return ended


def _executor(folder: Path, cluster: str, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError("--cluster needs submitit", "pip install 'megu-cli[cluster]'") from None
    _check(options)
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--cluster {cluster}: {brief(str(error))}", "submitit knows slurm and local.") from None
    # A task is one process: srun would not hand on cpus_per_task.
    parameters = {"name": "megu", "timeout_min": _MINUTES, "slurm_use_srun": False, **options}
    try:
        executor.update_parameters(**parameters)
    except (ValueError, RuntimeError, NameError, TypeError, AssertionError) as error:
        first, *_ = str(error).splitlines() or [""]
        raise ConfigError(f"--cluster-option: {first}", "docs/scaling.md names the usual options.") from None
    # Exported to the tasks; libraries would take all cores of a machine for themselves. submitit too prefers the option
    # with the cluster's name.
    threads = options.get(f"{cluster}_cpus_per_task") or options.get("cpus_per_task") or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return executor


def _check(options: Mapping[str, Any]) -> None:
    """Refuse values of the wrong kind before submitit does, or takes them.

    Raises:
        ConfigError: An option has such a value.
    """
    for key, value in options.items():
        kind = _KINDS.get(key.removeprefix("slurm_").removeprefix("local_"))
        if kind and value is not None and not kind.accepts(value):
            raise ConfigError(
                f"--cluster-option {key}: {brief(value)} is not {kind.description}",
                f"Write it as --cluster-option {key}={kind.example}.",
            )


def _compute(out: Path, opened: Opened, failures: Mapping[str, str], force: bool, name: str) -> tuple[Ended, list[str]]:
    """Compute one cell, in a task; return its end and its lines."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # submitit would wait for a checkpoint of its own
        signal.signal(number, signal.SIG_DFL)
    lines: list[str] = []
    # As `--cell` does: the task may outlive the first process.
    with writing.locked(out, together=True):
        ended = computed(opened(lines.append), name, failures, force)
    return ended, [line for line in lines if not line.endswith(": fresh")]
