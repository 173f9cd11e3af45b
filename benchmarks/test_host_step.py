"""The host's part of a pure decode step. Bar: 50 us + 3 us per sequence at 256 and 1024."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.batches import DecodingBatch

ROUNDS = 400


@pytest.mark.benchmark(group="host step")
@pytest.mark.parametrize("count", [1, 32, 256, 1024])
def test_host_step(benchmark: Any, count: int) -> None:
    """Commit, stops, hand-out, schedule and input tensors."""
    batch = DecodingBatch(count)
    benchmark.extra_info.update(sequences=count, bar_s=50e-6 + 3e-6 * count)
    inputs = benchmark.pedantic(batch.host_step, setup=batch.drain, rounds=ROUNDS, warmup_rounds=5)
    assert len(inputs.token_ids) == count


@pytest.mark.benchmark(group="host step, every request with a stop string")
@pytest.mark.parametrize("count", [256, 1024])
def test_host_step_with_stops(benchmark: Any, count: int) -> None:
    """The same where the engine thread also makes the text of every token and looks for stop strings in it."""
    batch = DecodingBatch(count, stops=True)
    benchmark.extra_info.update(sequences=count, bar_s=50e-6 + 3e-6 * count)
    inputs = benchmark.pedantic(batch.host_step, setup=batch.drain, rounds=ROUNDS, warmup_rounds=5)
    assert len(inputs.token_ids) == count


@pytest.mark.benchmark(group="readers")
@pytest.mark.parametrize("count", [256, 1024])
def test_readers(benchmark: Any, count: int) -> None:
    """What the readers' threads do with a step's tokens (not the engine's): text and one event per sequence."""
    batch = DecodingBatch(count)
    benchmark.extra_info.update(sequences=count)
    assert (
        benchmark.pedantic(batch.read, setup=lambda: batch.host_step() and None, rounds=100, warmup_rounds=5) == count
    )


@pytest.mark.benchmark(group="scheduler")
@pytest.mark.parametrize("count", [1, 32, 256, 1024])
def test_commit_and_schedule(benchmark: Any, count: int) -> None:
    """The scheduler alone."""
    batch = DecodingBatch(count)
    benchmark.extra_info.update(sequences=count)
    plan = benchmark.pedantic(batch.plan_step, rounds=ROUNDS, warmup_rounds=5)
    assert len(plan.decode_slots) == count
