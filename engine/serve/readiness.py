"""Whether the model answers: not whether a process runs, but whether steps are being completed."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from headrace.engine import EngineClosed, Finished, QueueFull, SamplingParams
from headrace.engine.serve.errors import unavailable

if TYPE_CHECKING:
    from headrace.engine import Engine

FRESH_SECONDS = 10.0
"""A step completed so recently proves that the model answers."""

STALL_SECONDS = 60.0
"""A model that has work and completes no step for so long does not answer. Steps of a big model on a CPU are slow."""

PROBE = [0]
"""The prompt of a probe: any one token."""


class Readiness:
    """Watches the engine's count of steps; asks an idle engine for one token."""

    def __init__(self) -> None:
        self._steps = 0  # completed, when last looked at
        self._moved = 0.0  # when that was seen to have grown
        self._busy_since: float | None = None  # when work was first seen without a step since
        self._probe: asyncio.Task[bool] | None = None

    async def check(self, engine: Engine) -> None:
        """Raise ApiError 503 unless the model answers."""
        if not engine.accepting:
            raise unavailable("the engine has stopped", "stopped")
        stats, now = engine.stats(), time.monotonic()
        self._look(stats["steps"], now)
        if self._steps and now - self._moved < FRESH_SECONDS:
            return
        if stats["running"] + stats["waiting"]:
            self._busy_since = now if self._busy_since is None else self._busy_since
            if self._steps and now - self._busy_since < STALL_SECONDS:
                return
        elif await self._answers(engine):
            self._look(engine.stats()["steps"], time.monotonic())
            return
        raise unavailable("the model does not answer", "not_answering")

    def _look(self, steps: int, now: float) -> None:
        if steps > self._steps:
            self._steps, self._moved, self._busy_since = steps, now, None

    async def _answers(self, engine: Engine) -> bool:
        """One probe at a time, whoever asks."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(_probe(engine))
        return await asyncio.shield(self._probe)


async def _probe(engine: Engine) -> bool:
    try:
        stream = engine.generate_stream(PROBE, SamplingParams(max_tokens=1, temperature=0))
    except (QueueFull, EngineClosed):
        return False
    try:
        async with asyncio.timeout(FRESH_SECONDS):
            async for event in stream:
                if isinstance(event, Finished):
                    return event.reason != "error" and event.reason != "abort"
    except TimeoutError:
        pass
    finally:
        stream.abort()
    return False
