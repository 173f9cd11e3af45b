"""The house keeps its rules: lint, types, import direction, sizes. This is why ``pytest`` is the one check command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("engine", "kernels", "tokenizer")
MAX_LINES = 500
MAX_FUNCTION_LINES = 60


def run(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if result.returncode:
        pytest.fail(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}", pytrace=False)


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: pip install '.[test]'"
    return found


def test_lint():
    run(tool("ruff"), "check", ".")


def test_format():
    run(tool("ruff"), "format", "--check", ".")


def test_types(tmp_path):
    """The three folders are mapped under ``headrace`` when installed; mypy needs to see them so."""
    package = tmp_path / "headrace"
    package.mkdir()
    for name in SOURCES:
        (package / name).symlink_to(ROOT / name)
    run(
        tool("mypy"), "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"),
        "--namespace-packages", "--explicit-package-bases", "-p", "headrace.engine", "-p", "headrace.tokenizer",
        "-p", "headrace.kernels",
        cwd=tmp_path, MYPYPATH=str(tmp_path),
    )  # fmt: skip


def test_arrows_point_down():
    run(tool("lint-imports"), "--config", "pyproject.toml", "--no-cache")


def python_files() -> list[Path]:
    return [p for folder in (*SOURCES, "benchmarks", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in python_files() if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}"


def test_functions_stay_small():
    import ast

    long = []
    for path in python_files():
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {lines}")
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"
