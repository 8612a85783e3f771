"""The run directory: where the artifacts are, its log, and what is remembered of files and inputs."""

from __future__ import annotations

from megu_cli.config import Config
from megu_cli.errors import ArtifactError
from megu_cli.pipeline.remembered import InputMemory
from megu_cli.run import files
from megu_cli.run.file_digests import FileDigestCache
from megu_cli.run.log import RunLog


class RunDirectory:
    """The run directory of a config.

    Args:
        config: The config; its ``out`` is the directory.
        file_digests: The remembered digests of another run on the same files; ``None``: those in the directory.
        remembers: False: nothing is remembered of the inputs, for a request that is not the config's.
    """

    def __init__(self, config: Config, file_digests: FileDigestCache | None = None, remembers: bool = True) -> None:
        self.out = config.out
        self.log = RunLog(self.out)
        self.file_digests = FileDigestCache(self.out / files.FILE_DIGESTS) if file_digests is None else file_digests
        self.input_memory = InputMemory(config, active=remembers)

    def renew(self) -> None:
        """Read every input again; what was remembered of them is replaced."""
        self.file_digests.renew()
        self.input_memory.forget()

    def keep_digests(self, only_beside_runs: bool = False) -> None:
        """Write the remembered digests to the directory, where they changed.

        Args:
            only_beside_runs: Do so only where a run left some that were not purged, and never fail: for commands that
                write nothing else, and would read gigabytes of weights again each time.
        """
        if only_beside_runs and not any(
            (self.out / name).is_file() for name in (files.FILE_DIGESTS, files.INPUT_DIGESTS)
        ):
            return
        try:
            self.file_digests.keep()
            self.input_memory.keep()
        except ArtifactError:
            if not only_beside_runs:
                raise
