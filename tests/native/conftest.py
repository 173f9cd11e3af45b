"""Tests of what is native alone: libraries, pools, and equal bits on every instruction path."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from headrace.kernels import native_is_built

if not native_is_built():
    collect_ignore_glob = ["test_*.py"]  # tests/unit/test_native_build.py fails where a compiler would have built it


@pytest.fixture(scope="session")
def pools() -> list[object]:
    """A pool of 1, 2 and 3 threads on each instruction path of this machine."""
    from headrace.kernels.native.library import EXACT_PATHS, Pool, available_paths

    paths = [path for path in available_paths() if path in EXACT_PATHS]
    return [Pool(threads, path) for path, threads in itertools.product(paths, (1, 2, 3))]
