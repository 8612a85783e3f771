from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def megu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; gives exit code, stdout, stderr."""
    from megu_cli.cli import app

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megu", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a megu.yaml for digits, with the given sections over it."""

    def write(**sections: Any) -> Path:
        config = {
            "data": {"name": "digits"},
            "model": {"name": "small_cnn"},
            "forget": {"classes": ["8"]},
            "out": "run",
            **sections,
        }
        file = tmp_path / "megu.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    return write
