"""``headrace bench``: run the project's benchmarks, show and plot their rows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from headrace.engine.cli.common import UserError


def bench(
    suite: Annotated[str, typer.Argument(help="Which: kernels, host_step, engine_step, or all of them.")] = "kernels",
    select: Annotated[str | None, typer.Option("--select", "-k", help="Only names that match, as for pytest.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Append the rows here (JSON lines).", show_default="a temporary file")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the kernels' rates (PNG).")] = None,
) -> int:
    """Time the engine's parts on this machine: kernels on its GPU if it has one, else the references on its CPU."""
    root = _checkout()
    names = sorted(path.stem.removeprefix("test_") for path in (root / "benchmarks").glob("test_*.py"))
    if suite != "all" and suite not in names:
        raise UserError(f"no benchmarks called {suite!r}: there are all, {', '.join(names)}")
    if missing := [name for name in ("pytest", "pytest_benchmark", "matplotlib") if find_spec(name) is None]:
        raise UserError(f"benchmarks need {', '.join(missing)}: pip install 'headrace[test]'")
    target = "benchmarks" if suite == "all" else f"benchmarks/test_{suite}.py"
    with tempfile.TemporaryDirectory() as folder:
        file = (rows or Path(folder) / "rows.jsonl").resolve()
        command = ["pytest", "-q", target, "--benchmark-enable", "--benchmark-quiet", "--rows", str(file)]
        status = _run(root, *command, *(["-k", select] if select else []))
        if status == 5:  # pytest's word for it
            raise UserError(f"no benchmark of {suite}" + (f" matches {select!r}" if select else ""))
        if status:
            return status
        return _run(root, "benchmarks.show", str(file), *(["--plot", str(plot.resolve())] if plot else []))


def _run(root: Path, module: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root, check=False).returncode


def _checkout() -> Path:
    """The project's folder: where the package's sources lie, or the current one."""
    import headrace.kernels

    for root in (Path(headrace.kernels.__file__).resolve().parents[1], Path.cwd()):
        if (root / "benchmarks" / "show.py").is_file():
            return root
    raise UserError("bench runs from a checkout of the project: its benchmarks are not part of the installed package")
