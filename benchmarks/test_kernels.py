"""Every op of a step: the Triton kernels at Super's sizes on a GPU, the references at an eighth of them on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.ops import DECODE, EIGHTH, PROMPT, SUPER, Bench, Work
from headrace.kernels import select

GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Bench:
    if GPU:
        # Untimed, in the test suite, the small sizes do: Super's experts take 11 GB while they are packed.
        timed = not request.config.getoption("benchmark_disable")
        return Bench(select("triton"), torch.device("cuda"), torch.bfloat16, SUPER if timed else EIGHTH)
    return Bench(select("reference"), torch.device("cpu"), torch.float32, EIGHTH)


def measure(benchmark: Any, bench: Bench, name: str, rows: int, make: Callable[[Bench, int], Work]) -> None:
    work = make(bench, rows)

    def run() -> Any:
        out = work.run()
        if GPU:
            torch.cuda.synchronize()
        return out

    benchmark.extra_info.update(
        op=name, rows=rows, shape="Super" if bench.shape is SUPER else "an eighth", minimum_bytes=work.minimum_bytes
    )
    out = benchmark.pedantic(run, rounds=20 if GPU else 7, warmup_rounds=2)
    assert not any(t.isnan().any() for t in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("rows", [1, 8, 32, 128] if GPU else [1, 8, 32])
@pytest.mark.parametrize("name", DECODE)
def test_decode(benchmark: Any, bench: Bench, name: str, rows: int) -> None:
    """One op for ``rows`` sequences, from call to result."""
    measure(benchmark, bench, name, rows, DECODE[name])


@pytest.mark.benchmark(group="prompt")
@pytest.mark.parametrize("rows", [256, 2048] if GPU else [256])
@pytest.mark.parametrize("name", PROMPT)
def test_prompt(benchmark: Any, bench: Bench, name: str, rows: int) -> None:
    """One op for ``rows`` tokens of one prompt, from call to result."""
    measure(benchmark, bench, name, rows, PROMPT[name])
