"""Every op of a step on every backend: full sizes on a GPU, an eighth of them on a CPU (``--sizes`` for others)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Case, backends
from benchmarks.ops import SIZES, Sizes
from headrace.kernels import FORMATS, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

kernels_of = cache(select)  # once each: a backend may have threads of its own


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Backend, case and rows. Untimed, in the test suite, one small size does."""
    config = metafunc.config
    timed = not config.getoption("benchmark_disable")
    name = config.getoption("--sizes") or ("full" if timed and DEVICE.type == "cuda" else "eighth")
    if name not in SIZES:
        raise pytest.UsageError(f"--sizes must be {' or '.join(SIZES)}, got {name!r}")
    sizes = SIZES[name]
    group = metafunc.function.__name__.removeprefix("test_")
    runs = [
        pytest.param(backend, case, sizes, rows, id=f"{backend}-{case.name}-{rows}")
        for backend in backends(DEVICE)
        for case in CASES
        if case.group == group and case.format in FORMATS[backend]
        for rows in (case.rows(sizes) if timed else case.rows(sizes)[:2][-1:])
    ]
    metafunc.parametrize(("backend", "case", "sizes", "rows"), runs)


def measure(benchmark: Any, backend: str, case: Case, sizes: Sizes, rows: int) -> None:
    work = case.build(kernels_of(backend), DEVICE, sizes, rows)

    def run() -> tuple[torch.Tensor, ...]:
        out = work.results()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.extra_info.update(
        op=case.name, rows=rows, backend=backend, on=DEVICE.type, sizes=sizes.name, dtype=case.dtype,
        minimum_bytes=work.minimum_bytes, flops=work.flops,
    )  # fmt: skip
    out = benchmark.pedantic(run, rounds=20 if DEVICE.type == "cuda" else 7, warmup_rounds=2)
    assert not any(t.isnan().any() for t in out)


@pytest.mark.benchmark(group="decode")
def test_decode(benchmark: Any, backend: str, case: Case, sizes: Sizes, rows: int) -> None:
    """One op for ``rows`` sequences, from call to result."""
    measure(benchmark, backend, case, sizes, rows)


@pytest.mark.benchmark(group="prompt")
def test_prompt(benchmark: Any, backend: str, case: Case, sizes: Sizes, rows: int) -> None:
    """One op for ``rows`` tokens of one prompt, from call to result."""
    measure(benchmark, backend, case, sizes, rows)
