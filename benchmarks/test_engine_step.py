"""One whole decode step of the embedded model on the reference backend: model, sampler and host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headrace.engine import Engine, EngineConfig
from headrace.engine.loop import Inbox
from headrace.engine.schedule.plan import SlotParams
from headrace.engine.schedule.sequence import Sequence
from headrace.engine.waiting import ThreadWaiter


@pytest.mark.benchmark(group="engine step")
@pytest.mark.parametrize("count", [1, 32, 256, 1024])
def test_decode_step(benchmark: Any, count: int) -> None:
    """``count`` sequences decode one token each; drives the loop's step by hand, without its thread."""
    with Engine(config=EngineConfig(max_sequences=count, num_pages=count * 8, max_context=128)) as engine:
        loop, scheduler = engine._loop, engine._scheduler
        waiter = ThreadWaiter()
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
        benchmark.extra_info.update(sequences=count, model=engine.model_name)
        assert benchmark.pedantic(step, rounds=20 if count <= 32 else 5, warmup_rounds=1) == count
