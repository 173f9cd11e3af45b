"""math.h against float64 over all of fp32's range, the same bits on every path."""

import shutil
import subprocess
from pathlib import Path

import pytest

from headrace.kernels.native.library import EXACT_PATHS, available_paths

SOURCES = Path(__file__).parents[2] / "kernels" / "native"

AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2),
    "avx2": AVX2,
    "portable": (),
}
"""What CMakeLists.txt compiles a path with."""

ULP = {"exp": 1.1, "log": 0.9, "log1p": 1.5}
"""Worst errors; 1.010, 0.827 and 1.399 were seen over all 2^32 words."""

EDGES = {
    "exp": "1 1 0.36787945 2.71828175 inf 0 nan 1 inf",
    "log": "-inf -inf nan 0 inf nan nan -103.278931 88.7228394",
    "log1p": "0 0 -inf 0.693147182 inf nan nan 1.40129846e-45 88.7228394",
}
"""Of 0, -0, -1, 1, inf, -inf, NaN, the least and the largest fp32."""


def test_elementary_functions(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    outputs = []
    for path in (path for path in available_paths() if path in EXACT_PATHS):
        program = tmp_path / path
        source = Path(__file__).with_name("math_check.cpp")
        command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", *FLAGS[path]]
        subprocess.run([*command, f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
        outputs.append(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)
    assert set(outputs) == {outputs[0]}
    lines = outputs[0].splitlines()
    for line, (name, bound) in zip(lines[: len(ULP)], ULP.items(), strict=True):
        assert line.split()[0] == name
        assert float(line.split()[1]) <= bound, line
    assert lines[len(ULP) :] == list(EDGES.values())
