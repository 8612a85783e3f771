"""The files for CI: GitHub, GitLab, DVC and Docker. Each is read as its reader would, and what can run here runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY, Megu, subprocess_environment

from megu_cli.pipeline.inputs import INPUTS
from megu_cli.pipeline.stages import STAGES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".github" / "action.sh"
WORKFLOWS = [ROOT / "examples" / "github-actions.yml", *sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
# What a user already has, or what has a command of its own.
NOT_HANDED_OVER = {"oracle"}


def loaded(file: Path) -> dict:
    """A YAML file as YAML 1.2 has it, where `on` is a key like others."""
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in document.items()}


def needs(stage: str) -> set[str]:
    """The stages that a stage reads, with the original model in the checkpoint's place."""
    names = {INPUTS[need].made_by if need in INPUTS else need for need in STAGES[stage].needs}
    return names - {""} - NOT_HANDED_OVER


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows(file):
    workflow = loaded(file)
    assert workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        if "uses" in job:  # another workflow, called
            assert (ROOT / job["uses"]).is_file()
            assert "workflow_call" in loaded(ROOT / job["uses"])["on"]
            continue
        assert job["timeout-minutes"] <= 120
        assert set(job.get("needs", [])) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert step.get("uses", "./") == "./" or re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"])
            # Text that others choose never becomes a part of a script.
            assert "${{" not in step.get("run", "")
            if step.get("uses") in ("./", "OWNER/megu@main"):
                assert set(step["with"]) <= set(loaded(ROOT / "action.yml")["inputs"])


def test_each_supported_python_is_tested():
    from packaging.specifiers import SpecifierSet

    versions = loaded(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["unit"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    required = re.search(r'^requires-python = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert all(version in SpecifierSet(required[1]) for version in versions)
    assert "3.9" not in SpecifierSet(required[1])


def test_action():
    action = loaded(ROOT / "action.yml")
    assert action["runs"]["using"] == "composite"
    text = (ROOT / "action.yml").read_text()
    for name in set(re.findall(r"inputs\.([\w-]+)", text)):
        assert name in action["inputs"]
    for step in action["runs"]["steps"]:
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"]
    keys = set(re.findall(r"steps\.(\w+)\.outputs\.(\w+)", text))
    # What the script prints is what the action reads.
    assert keys == {("key", "key"), ("key", "prefix"), ("run", "directory")}
    assert all(f"{name}=" in SCRIPT.read_text() for _, name in keys)


def script(command: str, folder: Path, **environment: str) -> tuple[int, str, dict[str, str], str]:
    """Run the action's script: exit code, stderr, outputs, summary."""
    output, summary = folder / "github-output", folder / "github-summary"
    for file in (output, summary):
        file.write_text("")
    answer = subprocess.run(
        ["bash", str(SCRIPT), command],
        env={
            **subprocess_environment(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return answer.returncode, answer.stderr, outputs, summary.read_text()


def test_the_cache_key_follows_settings_and_files(tmp_path):
    (tmp_path / "delete.csv").write_text("1\n")
    config = {**TINY, "forget": {"samples": "delete.csv"}}
    (tmp_path / "megu.yaml").write_text(yaml.safe_dump(config))

    def key(**environment: str) -> str:
        code, err, outputs, _ = script("key", tmp_path, **environment)
        assert code == 0, err
        assert outputs["key"].startswith(outputs["prefix"])
        return outputs["key"]

    first = key()
    (tmp_path / "megu.yaml").write_text("# a comment\n" + yaml.safe_dump({**config, "out": "elsewhere"}))
    assert key() == first  # as nothing that counts has changed
    assert key(MEGU_SET="noise.steps=9\n") != first
    (tmp_path / "delete.csv").write_text("2\n")
    assert key() != first
    (tmp_path / "megu.yaml").write_text("nosie: {}\n")
    assert script("key", tmp_path)[0] != 0


@pytest.mark.slow
def test_the_action_s_script_runs_reports_and_requires(finished):
    folder = finished.parent
    code, err, outputs, summary = script("run", folder, MEGU_REQUIRE="\n  zrf>=0\n  forget_test_acc<=1\n")
    assert code == 0, err
    assert "running" not in err  # it is fresh
    assert Path(outputs["directory"]) == folder / "run"
    assert summary == (folder / "run" / "report.md").read_text()
    assert summary.startswith("# Unlearning report: ")
    code, err, _, summary = script("run", folder, MEGU_REQUIRE="zrf>=2", MEGU_OUT="run")
    assert code == 3
    assert "zrf>=2 is not met" in err
    assert summary  # it says by how much
    code, _, _, summary = script("run", folder, MEGU_SET="nosie.steps=2")
    assert (code, summary) == (2, "")


def with_a_command() -> list[str]:
    """Commands that compute stages, in the order of the table."""
    return list(dict.fromkeys(stage.command.split()[1] for stage in STAGES.values() if stage.command != "megu run"))


def test_gitlab_jobs_are_the_stages():
    jobs = loaded(ROOT / "examples" / "gitlab-ci.yml")
    assert jobs[".stage"]["script"].startswith('megu "$CI_JOB_NAME" -c')
    extending = {name for name, job in jobs.items() if isinstance(job, dict) and job.get("extends") == ".stage"}
    assert extending == set(with_a_command())
    order = jobs["stages"]
    for name in extending:
        # `similarity` makes the transition as well.
        read = {"similarity" if need == "transition" else need for need in needs(name)}
        assert read <= set(jobs[name].get("needs", []))
        assert all(order.index(jobs[need]["stage"]) <= order.index(jobs[name]["stage"]) for need in read)


def dvc_stages() -> dict:
    return loaded(ROOT / "examples" / "dvc.yaml")["stages"]


def test_dvc_stages_read_and_write_what_megu_s_do():
    stages = dvc_stages()
    assert list(stages) == with_a_command()
    for name, stage in stages.items():
        assert stage["cmd"] == f"megu {name} -o ${{run}}"
        made = {out for entry in stage["outs"] for out in entry}
        names = [name, "transition"] if name == "similarity" else [name]
        assert made >= {f"${{run}}/{STAGES[stage].file}" for stage in names}
        read = {f"${{run}}/{STAGES[need].file}" for stage in names for need in needs(stage) if need not in names}
        assert read <= set(stage["deps"])
        assert "megu.yaml" in stage["deps"]


@pytest.mark.slow
def test_dvc_computes_once_and_nothing_the_second_time(tmp_path):
    dvc = shutil.which("dvc", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert dvc, "pip install dvc"
    shutil.copy(ROOT / "examples" / "dvc.yaml", tmp_path)
    config = {key: value for key, value in TINY.items() if key != "out"}
    (tmp_path / "megu.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **subprocess_environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "HOME": str(tmp_path),
    }

    def called(*arguments: str) -> str:
        answer = subprocess.run([dvc, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout + answer.stderr

    called("init", "--no-scm")
    first = called("repro")
    ran = [name for name in dvc_stages() if f"Running stage '{name}'" in first]
    assert ran == list(dvc_stages())
    assert "train: running" in first
    second = called("repro")
    assert "Running stage" not in second
    assert "up to date" in second
    # A changed setting calls all stages; megu computes those that depend on it.
    config["noise"] = {**config["noise"], "steps": 5}
    (tmp_path / "megu.yaml").write_text(yaml.safe_dump(config))
    third = called("repro")
    assert "finetune: running" in third
    assert "train: running" not in third


def test_dockerfile_copies_what_is_there_and_starts_megu(megu: Megu):
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert {"pyproject.toml", "README.md", "LICENSE", "megu_cli"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    assert 'ENTRYPOINT ["megu"]' in lines
    usage = re.search(r"docker run .* megu (.*)$", lines[0])[1].split()
    assert usage[0] in megu("--help").out
    assert "USER megu" in lines
