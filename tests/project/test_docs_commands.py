"""The commands of README and the docs, run as they stand there on stand-ins for the user's files."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY, Megu, data_set, subprocess_environment
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("accelerate", "bash", "docker", "lint-imports", "megu", "mkdocs", "mypy", "openssl", "pip", "pre-commit",
            "pytest", "python", "ruff", "vllm", ".ci/run")  # fmt: skip
# What is not run here, and why.
EXCUSED = {
    r"pip install": "a package index; .ci/run runs README's",
    r"python -m venv|pre-commit": "an environment; .ci/run makes one",
    r"(ruff|mypy|lint-imports|mkdocs|pytest|MEGU_FUZZ_CASES=\d+ pytest)\b": ".ci/run runs it",
    r"python benchmarks/": "hours",
    r"docker": "a daemon and a package index",
    r"vllm": "a model server",
    r"accelerate launch --multi_gpu": "two GPUs",
    r"megu run .*tracking\.tracker=": "a tracker's package; tests/pipeline/test_tracking.py",
    r"megu compare .*--cluster slurm": "Slurm, in tests/compare/test_slurm.py",
}
ON_DIGITS = ("ci", "mllm", "records", "scaling")
ON_PHOTOS = ("README", "guide")


def commands(page: Path) -> list[str]:
    """The shell commands of a page: indented by four, after a `$`, or in a block of `sh`; without their comments."""
    found, block = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            block = line.strip("`") if block is None else None
            continue
        match = re.match(r"\$ (.*)" if block == "text" else r"    (.*)" if block is None else r"(.*)", line)
        if match and block in (None, "text", "sh", "bash") and match[1].split(" ")[0] in PROGRAMS:
            found.append(match[1].split("  #")[0].strip())
    return found


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def excused(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in EXCUSED)


def test_every_command_is_run_or_excused():
    found = {page.stem: [command for command in commands(page) if not excused(command)] for page in PAGES}
    assert {name for name, left in found.items() if left} == {*ON_DIGITS, *ON_PHOTOS}
    assert sum(map(len, found.values())) > 25
    every = [command for page in PAGES for command in commands(page)]
    assert not [pattern for pattern in EXCUSED if not any(re.match(pattern, command) for command in every)]


def run(command: str, megu: Megu, codes: tuple[int, ...] = (0,)) -> None:
    """Run one command in the working directory; what megu prints stands in the message of a failure."""
    command, _, file = command.partition(" > ")
    words = shlex.split(command)
    if words[0] == "megu":
        answer = megu(*words[1:])
        assert answer.code in codes, f"{command}\n{answer.out}\n{answer.err}"
        if file:
            Path(file).write_text(answer.out)
        return
    words[0] = sys.executable if words[0] == "python" else words[0]
    made = subprocess.run(words, env=subprocess_environment(), capture_output=True, text=True, check=False)
    assert made.returncode == 0, f"{command}\n{made.stdout}\n{made.stderr}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config for ten listed digits, and the run of it in megu-run, runs/a and runs/b."""
    folder = tmp_path_factory.mktemp("digits")
    names = list(data_set("digits", limit=400).train.names)
    for file, some in (("deletion.csv", names[:10]), ("dsr17.csv", names[10:15])):
        (folder / file).write_text("".join(f"{name}\n" for name in some))
    config = {
        **TINY,
        "out": "megu-run",
        "forget": {"samples": "deletion.csv"},
        "labels": {"proxy": {"images": 200, "passes": 1, "networks": 1}},
    }
    (folder / "megu.yaml").write_text(yaml.safe_dump(config))
    made = subprocess.run(
        [sys.executable, "-m", "megu_cli", "run", "-q"],
        cwd=folder, env=subprocess_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    for name in ("a", "b"):
        shutil.copytree(folder / "megu-run", folder / "runs" / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    shutil.copy(folder / "megu-run" / "similarity.json", folder / "other.json")
    (folder / "photos-2027").mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 8), 99 * i, np.uint8)).save(folder / "photos-2027" / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DIGITS)
def test_commands_on_digits(name, digits, megu, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(digits, folder, symlinks=True)
    monkeypatch.chdir(folder)
    page = ROOT / "docs" / f"{name}.md"
    # The keys of a record are made once, before: the page explains them second.
    for command in sorted(commands(page), key=lambda command: not command.startswith("openssl")):
        if excused(command):
            continue
        # A network that was trained for two passes meets no requirement.
        command = command.replace("wolf", "9")  # the digits have no wolves
        run(command, megu, codes=(3,) if "--require" in command else (0,))
        for file in ("record.json", "record.salt"):
            if (folder / "megu-run" / file).exists():
                shutil.copy(folder / "megu-run" / file, folder / file)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's project: photos of shoes, the script, what it trained, and two lists. Photos differ in colour."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part, each in (("train", 60), ("test", 60)):
        for k, kind in enumerate(("boot", "sandal", "sneaker")):
            place = folder / "shoes" / part / kind
            place.mkdir(parents=True)
            for i in range(each):
                pixels = rng.normal(100, 40, (64, 64, 3))
                pixels[..., k] += rng.normal(25, 10)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"IMG_{i:05}.jpg")
    shutil.copytree(folder / "shoes", folder / "photos")
    chosen = [f"{kind}/IMG_{i:05}.jpg" for kind in ("boot", "sandal", "sneaker") for i in range(5)]
    (folder / "delete.csv").write_text("".join(f"{name}\n" for name in chosen[:10]))
    (folder / "more.csv").write_text("".join(f"{name}\n" for name in chosen[10:]))
    (folder / "train.py").write_text(blocks(ROOT / "docs" / "guide.md", "python")[0])
    (folder / "ratings.json").write_text(blocks(ROOT / "docs" / "guide.md", "json")[0])
    made = subprocess.run([sys.executable, "train.py", "train"], cwd=folder, env=subprocess_environment(), check=False)
    assert made.returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_PHOTOS)
def test_commands_on_photos(name, photos, megu, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(photos, folder)
    monkeypatch.chdir(folder)
    page = ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"
    configs = blocks(ROOT / "docs" / "guide.md", "yaml")
    second = next(text for text in configs if text.startswith("# second.yaml"))
    Path("second.yaml").write_text(second)
    for command in commands(page):
        if excused(command):
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # of a user who is asked before a purge
        run(command, megu)
        if command.startswith("megu init"):
            # What only the user knows, as the guide says it.
            config = Path("megu.yaml").read_text()
            for key, value in (("image_size", "32"), ("ratings", "ratings.json")):
                config, number = re.subn(
                    rf"^(#? *){key}: \S+", rf"  {key}: {value}", config, count=1, flags=re.MULTILINE
                )
                assert number == 1
            Path("megu.yaml").write_text(re.sub(r"^# mllm:", "mllm:", config, flags=re.MULTILINE))
    assert Path("megu-run/model.pth").is_file()
