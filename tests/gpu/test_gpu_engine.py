"""The engine on a GPU: right answers, one numerics, nothing that waits unasked."""

import pytest
import torch

from headrace.engine import Engine, EngineConfig, SamplingParams

pytestmark = pytest.mark.gpu

PROBLEMS = [(a, b) for a in (7, 45, 482, 9034) for b in (3, 68, 951, 7777)]


@pytest.fixture(scope="module")
def engine():
    with Engine(config=EngineConfig(device="cuda", max_sequences=32)) as engine:
        yield engine


def ask(engine, a, b, **params):
    messages = [{"role": "user", "content": f"What is {a} + {b}?"}]
    return engine.chat_stream(messages, SamplingParams(max_tokens=400, **params))


def tokens(engine, indices, **params):
    """All problems at once."""
    streams = [ask(engine, *PROBLEMS[i], seed=i, top_p=0.95, **params) for i in indices]
    for stream in streams:
        list(stream)
    return {i: stream.token_ids[0] for i, stream in zip(indices, streams, strict=True)}


def test_greedy_answers_are_the_references(engine):
    """bf16 caches and activations change none of these answers (tried on a CPU): the model is sure of them."""
    with Engine() as reference:
        assert tokens(engine, range(16), temperature=0) == tokens(reference, range(16), temperature=0)


def test_preemption_chunks_and_budgets_change_nothing(engine):
    """Sequences saved to pinned memory and back, prompts in chunks, reasoning cut short."""
    for budget in (-1, 9):
        expected = tokens(engine, range(16), temperature=1.0, reasoning_budget=budget)
        small = EngineConfig(device="cuda", max_sequences=16, prefill_chunk=32, num_pages=60, max_context=600)
        with Engine(config=small) as tight:
            assert tokens(tight, range(16), temperature=1.0, reasoning_budget=budget) == expected
            assert tight.stats()["preemptions"] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_does_not_matter(engine, temperature):
    together = tokens(engine, range(16), temperature=temperature)
    for i in range(0, 16, 5):
        assert tokens(engine, [i], temperature=temperature) == {i: together[i]}
    assert tokens(engine, range(16)[::-1], temperature=temperature) == together


def test_a_decode_step_never_waits(engine):
    """torch raises at any synchronising call; the engine's own wait for its stream is not one of those."""
    runner = engine._loop._runner
    launch = runner._launch

    def strict(plan):
        torch.cuda.set_sync_debug_mode("error" if not plan.chunks and not plan.starts else "default")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner._launch = strict
    try:
        stream = ask(engine, 12, 34, temperature=1.0, seed=1)
        list(stream)
    finally:
        runner._launch = launch
    assert len(stream.token_ids[0]) > 5
