"""The other side of ``processes.PythonApi``: an engine that answers the loads on its stdin, a JSON line each.

python -m benchmarks.load.through_python '{"max_sequences": 64}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict

from benchmarks.load.drive import drive
from benchmarks.load.processes import Settings
from benchmarks.load.samples import ANSWERED, REFUSED, Sample, figures
from benchmarks.load.workload import Load, Row, Workload
from headrace.engine import Delta, Engine, EngineConfig, QueueFull, SamplingParams


class Reader:
    """Asks an engine; for ``drive.drive``."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine, self._workload = engine, workload

    async def __call__(self, number: int, due: float) -> Sample:
        """Ask once."""
        sample, params = Sample(due), SamplingParams(**self._workload.sampling(number))
        try:
            async with self._engine.chat_stream(self._workload.messages(number), params) as stream:
                sample.status = ANSWERED
                async for event in stream:
                    if isinstance(event, Delta):
                        sample.arrived()
                        continue
                    sample.tokens = event.usage.completion_tokens
                    if event.reason == "error" or event.reason == "abort":
                        sample.error = event.error or event.reason
        except QueueFull as error:
            sample.status, sample.retry_after = REFUSED, error.retry_after
        sample.end = time.monotonic()
        return sample


def measure(engine: Engine, load: Load) -> Row:
    """One load's figures, with the CPU time that it took."""
    before = time.process_time()
    samples, seconds = asyncio.run(drive(Reader(engine, load.workload), load))
    return {**figures(samples, seconds), "cpu_s": {"python": time.process_time() - before}}


def main(settings: Settings) -> None:
    """Answer loads until stdin ends."""
    given = {name: value for name, value in asdict(settings).items() if value is not None and name != "model"}
    with Engine(settings.model, EngineConfig(**given)) as engine:
        for line in sys.stdin:
            print(json.dumps(measure(engine, Load.from_json(line))), flush=True)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
