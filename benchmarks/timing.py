"""Seconds of a call, and what the machine can do at most, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 29
READ_BYTES = 1 << 29  # far more than any cache holds
GEMM = 2048  # rows, columns and terms
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Timer:
    """Seconds of each of ``rounds`` calls; on a GPU everything a call needs is out of L2 before it."""

    device: torch.device
    rounds: int
    flush: Tensor | None = None  # larger than any L2; reading it leaves no line that has still to be written back

    @classmethod
    def on(cls, device: torch.device, rounds: int) -> Timer:
        gpu = device.type == "cuda"
        return cls(device, rounds, torch.ones(FLUSH_BYTES, dtype=torch.uint8, device=device) if gpu else None)

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Sorted."""
        run()  # compiles
        return sorted(self._once(run) for _ in range(self.rounds))

    def _once(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self.flush.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # the launches queue up behind it, so that the host's time is not counted
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True, slots=True)
class Limit:
    """What a device was seen to do at most: the best of ROUNDS. All measured, nothing from a data sheet."""

    device: str  # "cpu" or "cuda"
    threads: int | None  # of a CPU
    bytes_per_s: float
    bytes_by: str
    flops_per_s: float
    flops_by: str

    def seconds(self, minimum_bytes: int, flops: int) -> float:
        """The least time at these rates: memory and arithmetic at once."""
        return max(minimum_bytes / self.bytes_per_s, flops / self.flops_per_s)


def measure(device: torch.device) -> list[Limit]:
    """The limits of the device: of a CPU with one thread and with as many as torch uses now."""
    if device.type == "cuda":
        return [_gpu_limit(device)]
    limits = []
    for count in sorted({1, torch.get_num_threads()}):
        with threads(count):
            limits.append(_cpu_limit(count))
    return limits


def _cpu_limit(count: int) -> Limit:
    timer = Timer(torch.device("cpu"), ROUNDS)
    # Sums of integers: of torch's reductions the one that keeps up best with memory.
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    a, b = torch.randn(2, GEMM, GEMM)
    return Limit(
        "cpu",
        count,
        READ_BYTES / timer(memory.sum)[0],
        f"sum over {READ_BYTES >> 20} MiB",
        2 * GEMM**3 / timer(lambda: torch.mm(a, b))[0],
        f"fp32 GEMM of {GEMM} x {GEMM} x {GEMM}",
    )


def _gpu_limit(device: torch.device) -> Limit:
    timer = Timer.on(device, ROUNDS)
    size = 1 << 30
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    return Limit(
        "cuda",
        None,
        2 * size / timer(lambda: target.copy_(source))[0],
        "copy of 1 GiB, read and written",
        2 * 8192**3 / timer(lambda: torch.mm(a, b))[0],
        "bf16 GEMM of 8192 x 8192 x 8192",
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
