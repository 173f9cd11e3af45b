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


def test_it_answers_as_the_reference_does(engine):
    for a, b in PROBLEMS:
        stream = ask(engine, a, b, temperature=0)
        list(stream)
        text = engine.tokenizer.decode(list(stream.token_ids[0]))
        assert str(a + b) in text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_does_not_matter(engine, temperature):
    def run(indices):
        streams = [ask(engine, *PROBLEMS[i], temperature=temperature, seed=i, top_p=0.95) for i in indices]
        for stream in streams:
            list(stream)
        return {i: stream.token_ids[0] for i, stream in zip(indices, streams, strict=True)}

    together = run(range(len(PROBLEMS)))
    for i in range(0, len(PROBLEMS), 5):
        assert run([i]) == {i: together[i]}
    assert run(list(range(len(PROBLEMS)))[::-1]) == together


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
