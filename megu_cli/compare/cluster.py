"""Workers of a comparison that are tasks of a cluster, by submitit: each task computes one cell."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megu_cli.compare.arena import Say
from megu_cli.compare.cells import Cells
from megu_cli.compare.jobs import Ended, Opened, computed
from megu_cli.errors import ConfigError, MeguError, brief
from megu_cli.run import files, writing

# A task may take so long unless an option gives another limit; submitit's own default is five minutes.
_MINUTES = 60
_POLL_SECONDS = 0.5


class ClusterWorkers:
    """Tasks that each compute one cell, submitted as arrays. See `Workers`.

    Args:
        cells: The cells. All machines share their run directory.
        opened: Makes the same cells in a task.
        say: Called with a line for each cell that is submitted, and with the lines of each cell that is done.
        force: Compute again what is there.
        cluster: An executor of submitit: ``slurm``, or ``local`` for processes of this machine.
        options: Parameters of the executor, such as ``slurm_partition``, ``timeout_min`` and ``cpus_per_task``.
        number: Tasks at a time at most; ``None``: on this machine one for each core, else as many as the cluster runs.

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
        self.number = number or (os.cpu_count() if cluster == "local" else None)
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
            _, _, said = str(error).strip().rpartition("\n")
            raise MeguError(f"--cluster: the tasks cannot be submitted: {said}", "Check --cluster-option.") from None
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
            _, _, said = (job.stderr() or "").strip().rpartition("\n")
            return Ended(name, death=f"its task failed ({said})")
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
    # A task is one process: srun would not hand on cpus_per_task.
    given = {"name": "megu", "timeout_min": _MINUTES, "slurm_use_srun": False, **options}
    # Exported to the tasks; libraries would take all cores of a machine for themselves.
    os.environ.setdefault("OMP_NUM_THREADS", str(given.get("cpus_per_task", 1)))
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**given)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--cluster {cluster}: {brief(str(error))}", "submitit knows slurm and local.") from None
    except (NameError, TypeError, AssertionError) as error:
        first, *_ = str(error).splitlines() or [""]
        raise ConfigError(f"--cluster-option: {first}", "docs/scaling.md names the usual options.") from None
    return executor


def _compute(out: Path, opened: Opened, failures: Mapping[str, str], force: bool, name: str) -> tuple[Ended, list[str]]:
    """Compute one cell, in a task; return its end and its lines."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # submitit would wait for a checkpoint of its own
        signal.signal(number, signal.SIG_DFL)
    lines: list[str] = []
    # As `--cell` does: the task may outlive the first process.
    with writing.locked(out, together=True):
        ended = computed(opened(lines.append), name, failures, force)
    return ended, [line for line in lines if not line.endswith(": fresh")]
