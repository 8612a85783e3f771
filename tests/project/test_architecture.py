"""What modules see, and that heavy imports are never made by the light ones. `lint-imports` checks the layers."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import process

PACKAGE = Path(__file__).parents[2] / "megu_cli"
PURE = {"method", "baselines", "evaluation"}


def modules() -> dict[Path, str]:
    return {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_method_baselines_and_evaluation_see_tensors_and_settings_only():
    forbidden = {
        "megu_cli.run",
        "megu_cli.pipeline",
        "megu_cli.cli",
        "pathlib",
        "rich",
        "typer",
    }
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, unit in modules().items() if unit in PURE
        for name in imported(path) if any(name == f or name.startswith(f + ".") for f in forbidden)
    ]  # fmt: skip
    assert not wrong


def test_importing_the_package_is_light():
    light = [
        "megu_cli",
        *(f"megu_cli.{name}" for name in ("cli.app", "config", "run.artifacts", "errors", "execution.runtime")),
    ]
    heavy = {"torch", "transformers", "sklearn", "numpy", "matplotlib"}
    code = f"import sys, {', '.join(light)}; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    answer = process("-c", code)
    assert answer.returncode == 0, answer.stderr


def test_only_the_app_and_its_beginning_end_the_process():
    exits = [
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in {("sys", "exit"), ("os", "_exit")}
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]  # fmt: skip
    assert exits == ["cli/app.py", "entry.py"]
