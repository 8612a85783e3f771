"""Draw what a command prints as an SVG: the picture in README is what the command says.

python docs/terminal.py docs/figures/demo.svg megu eval -c megu-demo/megu.yaml
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main(target: Path, command: list[str]) -> None:
    """Run the command as in a terminal of `WIDTH` columns and draw its stdout."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(said))
    # An id of its own: by default it follows the content's hash, which changes from process to process.
    target.write_text(console.export_svg(title=" ".join(command[:2]), unique_id="megu") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
