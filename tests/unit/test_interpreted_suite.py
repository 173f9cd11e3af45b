"""Runs tests/interpreted, and tests/kernels once more on the Triton kernels.

Triton interprets only where TRITON_INTERPRET=1 is set before it is imported, and one process cannot interpret and
compile, so each file gets a pytest of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("interpreted", "kernels") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]


def test_files_are_found():
    assert {path.parent.name for path in FILES} == {"interpreted", "kernels"}


def interpret(path: Path) -> subprocess.CompletedProcess[str]:
    """A pytest over one file."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(path.relative_to(ROOT))],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no wheels for this platform")
@pytest.mark.timeout(1200)
@pytest.mark.early(job=interpret)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path, early, request):
    result = early[request.node.nodeid].result()
    if result.returncode:
        pytest.fail(f"{path.name}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
