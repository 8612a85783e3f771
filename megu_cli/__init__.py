"""megu: make a trained image classifier forget, guided by a multimodal LLM (MeGU, arXiv:2602.17088)."""

from __future__ import annotations

TYPE_CHECKING = False  # of typing, whose import takes time before a signal is handled
if TYPE_CHECKING:
    from typing import Any

    from megu_cli.api import Unlearned, unlearn

__all__ = ["Unlearned", "__version__", "unlearn"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: the command line's help must not."""
    if name in ("Unlearned", "unlearn"):
        from megu_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
