"""A request's tokens are a function of the request alone: real (random) models, whatever else is running."""

from dataclasses import replace

import pytest
import torch
from networks import random_engine

from headrace.engine import Finished, SamplingParams

PROMPTS = [[(i * 37 + j * 11) % 700 + 20 for j in range(1 + 13 * i % 57)] for i in range(12)]
PARAMS = [
    SamplingParams(temperature=(0.0, 0.8, 1.5)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i, max_tokens=10 + 3 * i, n=1)
    for i in range(12)
]


def outputs(engine, order):
    streams = {i: engine.generate_stream(PROMPTS[i], PARAMS[i]) for i in order}
    for stream in streams.values():
        list(stream)
    return {i: stream.token_ids[0] for i, stream in streams.items()}


@pytest.fixture(scope="module")
def alone(text):
    """Every request by itself, its prompt in one chunk."""
    result = {}
    with random_engine(text, max_sequences=1, prefill_chunk=128) as engine:
        for i in range(len(PROMPTS)):
            result.update(outputs(engine, [i]))
    assert len({tokens[:6] for tokens in result.values()}) > 6, "a model that says one thing proves nothing"
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"max_sequences": 12, "prefill_chunk": 8},
        {"max_sequences": 5, "prefill_chunk": 16, "page_size": 16},
        {"max_sequences": 12, "prefill_chunk": 64, "max_batched_tokens": 400},
    ],
    ids=["small chunks", "few slots", "all at once"],
)
def test_batch_order_and_chunks_do_not_matter(text, alone, options):
    with random_engine(text, **options) as engine:
        assert outputs(engine, range(12)) == alone
        assert outputs(engine, [7, 3, 11, 0, 9, 5, 1, 10, 4, 8, 2, 6]) == alone


@pytest.mark.parametrize("preempt_bytes", [0, 40_000, 1 << 30], ids=["recompute", "some of each", "saved"])
def test_preemption_does_not_matter(text, alone, preempt_bytes):
    with random_engine(text, max_sequences=8, num_pages=30, max_context=110, preempt_bytes=preempt_bytes) as engine:
        assert outputs(engine, range(12)) == alone
        assert engine.stats()["preemptions"] > 0


def test_threads_do_not_matter(text, alone):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with random_engine(text, max_sequences=6) as engine:
                assert outputs(engine, range(12)) == alone
    finally:
        torch.set_num_threads(threads)


def test_neighbours_that_end_or_abort_do_not_matter(text, alone):
    with random_engine(text, max_sequences=6) as engine:
        noise = [engine.generate_stream([5 + i] * 9, SamplingParams(max_tokens=200, ignore_eos=True)) for i in range(4)]
        streams = [engine.generate_stream(PROMPTS[i], PARAMS[i]) for i in range(12)]
        for i, stream in enumerate(streams):
            if i % 3 == 1:
                noise[i // 3].abort()
            list(stream)
            assert stream.token_ids[0] == alone[i]


def test_choice_zero_equals_a_single_choice_and_choices_differ(text):
    with random_engine(text) as engine:
        many = engine.generate(PROMPTS[5], SamplingParams(seed=3, n=4, max_tokens=12, ignore_eos=True))
        one = engine.generate(PROMPTS[5], SamplingParams(seed=3, n=1, max_tokens=12, ignore_eos=True))
        assert many.choices[0].token_ids == one.choices[0].token_ids
        assert len({c.token_ids for c in many.choices}) == 4
        assert many.usage.completion_tokens == 48
        assert many.usage.prompt_tokens == len(PROMPTS[5])


def test_seeds_matter_and_their_absence_is_random(text):
    with random_engine(text) as engine:

        def run(seed):
            return engine.generate(PROMPTS[5], SamplingParams(seed=seed, max_tokens=12, ignore_eos=True))

        tokens = [run(seed).choices[0].token_ids for seed in (0, 1, 2**63, 2**64 - 1, None, None)]
        assert len(set(tokens)) == 6
        assert run(2**64 - 1).choices[0].token_ids == tokens[3]


def test_logprobs_are_each_rows_own_in_any_batch_and_after_preemption(text, alone):
    def rich(i):
        return replace(PARAMS[i], top_logprobs=4)

    def entries(stream):
        return [e for event in stream if not isinstance(event, Finished) for e in event.logprobs]

    with random_engine(text, max_sequences=1) as engine:
        expected = [entries(engine.generate_stream(PROMPTS[i], rich(i))) for i in range(12)]
    for options in ({"max_sequences": 12}, {"max_sequences": 8, "num_pages": 30, "max_context": 110}):
        with random_engine(text, **options) as engine:
            streams = [engine.generate_stream(PROMPTS[i], rich(i)) for i in range(12)]
            for i, stream in enumerate(streams):
                assert entries(stream) == expected[i]
                assert stream.token_ids[0] == alone[i]
    for i, found in enumerate(expected):
        assert all(len(e.top) == 4 and e.logprob <= e.top[0][1] + 1e-6 for e in found)
        if PARAMS[i].temperature == 0:
            assert all(e.token_id == e.top[0][0] for e in found)


def test_host_memory_for_preempted_sequences_is_bounded(text, alone, monkeypatch):
    limit, peak = 40_000, 0
    with random_engine(text, max_sequences=8, num_pages=30, max_context=110, preempt_bytes=limit) as engine:
        runner, move = engine._loop._runner, engine._loop._runner._move_sequences

        def move_and_weigh(plan):
            nonlocal peak
            move(plan)
            held = [t for saved, _ in runner._saved.values() for t in (*saved.pages, *saved.states)]
            peak = max(peak, sum(t.numel() * t.element_size() for t in held))

        monkeypatch.setattr(runner, "_move_sequences", move_and_weigh)
        assert outputs(engine, range(12)) == alone
    assert 0 < peak <= limit
