"""Kernels compiled ahead of time. A process interprets or compiles, so nothing here is collected under the
interpreter, nor where there is no Triton."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engine")]

collect_ignore_glob: list[str] = []
if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None:
    collect_ignore_glob.append("test_*.py")
