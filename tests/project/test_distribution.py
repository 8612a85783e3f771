"""What `python -m build` makes: a wheel of the package and its data, a source distribution with tests and docs too."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path) -> str:
    answer = subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def tracked() -> set[str]:
    """The files of the repository, as they stand here."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return {name for name in names if name and (ROOT / name).is_file()}


@pytest.mark.slow
def test_wheel_and_source_distribution_hold_what_they_should(tmp_path):
    source, dist = tmp_path / "source", tmp_path / "dist"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run("build", "--outdir", str(dist), ".", cwd=source)
    made = sorted(dist.iterdir())
    assert [path.suffix for path in made] == [".whl", ".gz"]
    assert run("twine", "check", "--strict", *map(str, made), cwd=source).count("PASSED") == 2

    package = {name for name in tracked() if name.startswith("megu_cli/")}
    wheel = {name for name in zipfile.ZipFile(made[0]).namelist() if ".dist-info/" not in name}
    assert wheel == package
    with tarfile.open(made[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    folders = ("megu_cli/", "tests/", "docs/", "examples/", ".github/workflows/")
    expected = {name for name in tracked() if name.startswith(folders)} | {"pyproject.toml", "README.md", "LICENSE"}
    assert expected <= names
    assert not [name for name in names if name.endswith((".pyc", ".safetensors")) or name.startswith("benchmarks/")]
