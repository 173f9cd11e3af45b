"""One whole decode step of the embedded model: model, sampler and host. Bar: the host's part 1 ms at 64 sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cases import backends
from headrace.engine import Engine, EngineConfig
from headrace.engine.loop import Inbox
from headrace.engine.schedule.plan import SlotParams
from headrace.engine.schedule.sequence import Sequence
from headrace.engine.waiting import ThreadWaiter
from headrace.kernels.native.library import Op, Pool


@contextmanager
def time_in_kernels() -> Iterator[list[float]]:
    """What the native library's functions take while the context lasts: one element, seconds."""
    spent, function = [0.0], Pool.function

    def timed(pool: Pool, op: Op) -> Callable[[int, bytes], int]:
        call = function(pool, op)

        def run(handle: int, arguments: bytes) -> int:
            start = time.perf_counter()
            status = call(handle, arguments)
            spent[0] += time.perf_counter() - start
            return status

        return run

    Pool.function = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Pool.function = function  # type: ignore[method-assign]


def decoding(engine: Engine, count: int) -> Callable[[], int]:
    """A function that decodes one token of ``count`` sequences; drives the loop's step by hand, without its thread."""
    loop, scheduler, waiter = engine._loop, engine._scheduler, ThreadWaiter()
    for i in range(count):
        params = SlotParams(120, 1.0, 0.95, i, 0, False, -1, True)
        prompt = np.arange(20, 24 + i % 4, dtype=np.int64)
        sequence = Sequence(prompt, params, sink=Inbox(waiter))
        scheduler.submit(sequence)
        loop._live[sequence] = None

    def step() -> int:
        plan = scheduler.schedule()
        assert plan is not None
        loop._step(plan)
        return len(plan.decode_slots)

    while step() < count:
        pass
    return step


@pytest.mark.benchmark(group="engine step")
@pytest.mark.parametrize("count", [1, 32, 64, 256, 1024])
@pytest.mark.parametrize("backend", [name for name in backends(torch.device("cpu")) if name != "triton"])
def test_decode_step(benchmark: Any, backend: str, count: int) -> None:
    """``count`` sequences decode one token each. The row says, for native kernels, what of the step is the host's."""
    config = EngineConfig(backend=backend, max_sequences=count, num_pages=count * 8, max_context=128)
    with Engine(config=config) as engine:
        step = decoding(engine, count)
        benchmark.extra_info.update(sequences=count, model=engine.model_name, backend=backend)
        if backend == "native":
            hosts = []
            with time_in_kernels() as spent:
                for _ in range(20):
                    before, start = spent[0], time.perf_counter()
                    step()
                    hosts.append(time.perf_counter() - start - (spent[0] - before))
            benchmark.extra_info.update(host_s=median(hosts))
        assert benchmark.pedantic(step, rounds=20 if count <= 64 else 5, warmup_rounds=1) == count
