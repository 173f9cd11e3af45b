"""Puts a load on something that answers: clients in a circle, or arrivals that do not wait for anybody."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from itertools import count

from benchmarks.load.samples import Sample
from benchmarks.load.workload import MAX_STREAMS, Load

Ask = Callable[[int, float], Awaitable[Sample]]
"""(number of the request, when it is due) -> what it saw. Failures are in the sample, not raised."""


async def drive(ask: Ask, load: Load) -> tuple[list[Sample], float]:
    """Every request's sample, and the seconds from the load's begin to its last answer."""
    start = time.monotonic()
    samples = await (_open(ask, load, start) if load.rate is not None else _closed(ask, load, start))
    return samples, max((sample.end for sample in samples), default=time.monotonic()) - start


async def _closed(ask: Ask, load: Load, start: float) -> list[Sample]:
    streams = load.streams or 0
    samples: list[Sample] = []

    async def client(index: int) -> None:
        for turn in count():
            now = time.monotonic()
            over = load.seconds is not None and now - start >= load.seconds
            if over or (load.requests is not None and turn >= load.requests):
                return
            samples.append(await ask(load.first + turn * streams + index, now))

    async with asyncio.TaskGroup() as group:
        for index in range(streams):
            group.create_task(client(index))
    return samples


async def _open(ask: Ask, load: Load, start: float) -> list[Sample]:
    """The arrivals are the same for the same seed. Beyond MAX_STREAMS at once none is sent: an error."""
    assert load.rate is not None and load.seconds is not None
    draw = random.Random(load.workload.seed)
    samples: list[Sample] = []
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        samples.append(await ask(number, due))

    due = start
    for number in count(load.first):
        due += draw.expovariate(load.rate)
        if due - start >= load.seconds:
            break
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if len(running) >= MAX_STREAMS:
            samples.append(Sample(due, end=time.monotonic(), error=f"not sent: {MAX_STREAMS} requests are open"))
            continue
        task = asyncio.create_task(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return samples
