"""Where and how to compute: device, seed, progress, the processes that share the work."""

from megu_cli.execution.execution import LOCAL, Execution, ResumePoint

__all__ = ["LOCAL", "Execution", "ResumePoint"]
