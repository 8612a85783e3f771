"""Run the guide's commands on its photos and print their output into the guide: python docs/guide_outputs.py [FOLDER].

Needs Fashion-MNIST (as data.name: fashion_mnist does), and some minutes. The prose around the outputs names some of
their figures: read it afterwards.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from megu_cli.config import DataConfig
from megu_cli.data import Preprocessing, load

GUIDE = Path(__file__).with_name("guide.md")
KINDS = {9: "boot", 5: "sandal", 7: "sneaker"}
EACH = {"train": 400, "test": 200}
COLUMNS = 100
# Lines of progress, for those who watch.
PROGRESS = re.compile(r"^[\w .:,-]+: \d[\d,]*/\d[\d,]*, .*\n", re.MULTILINE)


def photos(folder: Path) -> None:
    """Write the photos and the two lists: 40 and 10 training photos, drawn at random."""
    data = load(DataConfig(name="fashion_mnist", validation=0.0), Preprocessing())
    for part, split in (("train", data.train), ("test", data.test)):
        for label, kind in KINDS.items():
            place = folder / "shoes" / part / kind
            place.mkdir(parents=True)
            for position in (split.labels == label).nonzero()[: EACH[part], 0].tolist():
                picture = Image.fromarray(split.images[position][0].numpy()).convert("RGB").resize((64, 64))
                picture.save(place / f"IMG_{position:05}.jpg")
    root = folder / "shoes" / "train"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    drawn = random.Random(0).sample(names, 50)
    for file, some in (("delete.csv", drawn[:40]), ("more.csv", drawn[40:])):
        (folder / file).write_text("".join(f"{name}\n" for name in sorted(some)), encoding="utf-8")


def said(command: str, folder: Path) -> str:
    """What a command prints, without progress and with short paths."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONUNBUFFERED": "1"}
    made = subprocess.run(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"{command} ended with {made.returncode}\n{made.stdout}")
    lines = PROGRESS.sub("", made.stdout).replace(str(folder), "~/shoes-project").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def main(folder: Path) -> None:
    """Go through the guide's blocks of code in order: write the files that they show, run the commands."""
    text = GUIDE.read_text(encoding="utf-8")
    photos(folder)

    def renewed(block: re.Match[str]) -> str:
        language, content = block.groups()
        if language == "python":
            (folder / "train.py").write_text(content, encoding="utf-8")
            said("python train.py train", folder)
        elif language == "json":
            (folder / "ratings.json").write_text(content, encoding="utf-8")
        elif language == "yaml":
            name = re.match(r"# (\w+\.yaml)\n", content)
            (folder / (name[1] if name else "megu.yaml")).write_text(content, encoding="utf-8")
        elif content.startswith("$ "):
            command = content.splitlines()[0].removeprefix("$ ")
            sys.stderr.write(f"{command}\n")
            return f"```text\n$ {command}\n{said(command, folder)}```"
        return block[0]

    GUIDE.write_text(re.sub(r"```(\w+)\n(.*?)```", renewed, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
