"""The engine's public behaviour: ends, errors, stops, masks, streams, life."""

import asyncio
import gc
import threading

import numpy as np
import pytest
from networks import EOS, Scripted, random_engine, scripted_engine

from headrace.engine import (
    ContextExceeded,
    Delta,
    EngineClosed,
    EngineConfig,
    Finished,
    GenerationError,
    QueueFull,
    RequestError,
    SamplingParams,
)

GREEDY = SamplingParams(temperature=0.0)


def counting(token):
    """Counts up for ever through ids 300..399."""
    return 300 + (token - 299) % 100


def engine_threads():
    return [t for t in threading.enumerate() if t.name == "headrace-engine"]


def test_every_stream_ends_exactly_once_and_nothing_is_left(text):
    with scripted_engine(text, Scripted(lambda t: EOS if t == 305 else counting(t)), max_sequences=3) as engine:
        streams = [engine.generate_stream([300 + i % 5], GREEDY) for i in range(20)]
        for i, stream in enumerate(streams):
            ends = [e for e in stream if isinstance(e, Finished)]
            assert [e.reason for e in ends] == ["stop"]
            assert stream.token_ids[0] == (*range(301 + i % 5, 306), EOS)
            assert list(stream) == []
        stats = engine.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        assert stats["free_pages"] == stats["total_pages"]
        assert stats["free_slots"] == stats["total_slots"]
    assert not engine_threads()


def test_many_prompts_at_once_come_back_in_order(text):
    with scripted_engine(text, Scripted(counting), max_sequences=4) as engine:
        results = engine.generate([[300 + i] for i in range(30)], SamplingParams(temperature=0.0, max_tokens=3))
        assert [r.choices[0].token_ids for r in results] == [tuple(range(301 + i, 304 + i)) for i in range(30)]
        assert engine.generate([]) == []
        assert engine.generate([[300]], SamplingParams(temperature=0.0, max_tokens=1))[0].usage.completion_tokens == 1


def test_text_and_ids_are_the_same_prompt_and_markers_parse(text):
    with random_engine(text) as engine:
        params = SamplingParams(seed=1, max_tokens=8, ignore_eos=True)
        prompt = "<|im_start|>user\n12 + 34<|im_end|>\n"
        ids = engine.tokenizer.encode_with_markers(prompt)
        assert ids[0] == 10
        assert engine.generate(prompt, params).choices == engine.generate(ids, params).choices


def test_a_string_prompt_shows_markers_as_text(text):
    script = {300: 12, 12: 13, 13: EOS}
    with scripted_engine(text, Scripted(lambda t: script.get(t, 300))) as engine:
        result = engine.generate([5, 300], GREEDY)
        assert result.content == "<think></think>"
        assert result.reasoning_content is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 32769}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"n": 9}, "n"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"reasoning_budget": -2}, "reasoning_budget"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"mask": 3}, "mask"),
    ],
)
def test_bad_parameters_are_refused_by_name(params, field):
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**params)
    assert caught.value.param == field


@pytest.mark.parametrize(
    "options",
    [
        {"max_sequences": 0},
        {"max_sequences": True},
        {"prefill_chunk": -1},
        {"page_size": 1.5},
        {"max_context": 1},
        {"preempt_bytes": -1},
        {"device": "tpu"},
        {"closing_text": 3},
    ],
)
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EngineConfig(**options)


def test_what_cannot_fit_is_refused_at_the_door(text):
    with scripted_engine(text, Scripted(counting), num_pages=8, max_context=32) as engine:
        with pytest.raises(ContextExceeded, match="32 tokens.*31 fit"):
            engine.generate([300] * 32)
        with pytest.raises(RequestError, match="empty"):
            engine.generate("")
        with pytest.raises(RequestError, match="prompt ids"):
            engine.generate([300, 768])
        with pytest.raises(RequestError, match="prompt ids"):
            engine.generate([300, -1])
        result = engine.generate([300] * 31, GREEDY)  # the limit is clamped to the room
        assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (1, "length")
        result = engine.generate([300] * 5, GREEDY)
        assert result.usage.completion_tokens == 27
    with pytest.raises(ValueError, match="max_batched_tokens"):
        scripted_engine(text, Scripted(counting), max_batched_tokens=16)
    with pytest.raises(ValueError, match="max_context"):
        scripted_engine(text, Scripted(counting), num_pages=8, max_context=100)


def test_a_full_queue_refuses_and_disturbs_nobody(text):
    with scripted_engine(text, Scripted(counting), max_sequences=1, max_waiting=2) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=100)
        first = engine.generate_stream([300], params)
        assert isinstance(next(first), Delta)  # it is running: the queue is empty
        others = [engine.generate_stream([310], params) for _ in range(2)]
        with pytest.raises(QueueFull) as caught:
            engine.generate([320], params)
        assert caught.value.retry_after > 0
        for stream in (first, *others):
            assert [e.reason for e in stream if isinstance(e, Finished)] == ["length"]


def test_nan_fails_its_request_alone(text):
    network = Scripted(counting)
    network.poison = {307}
    with scripted_engine(text, network) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=6)
        streams = [engine.generate_stream([t], params) for t in (302, 304, 340)]
        ends = [[e for e in s if isinstance(e, Finished)][0] for s in streams]
        assert [e.reason for e in ends] == ["error", "error", "length"]
        assert "not finite" in ends[0].error
        assert streams[0].token_ids[0] == tuple(range(303, 308))
        with pytest.raises(GenerationError, match="not finite"):
            engine.generate([307], params)
        assert engine.stats()["free_slots"] == 8


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(text):
    network = Scripted(counting)
    network.fail_on = 333
    with scripted_engine(text, network, max_sequences=2) as engine:
        with pytest.raises(GenerationError, match="planted kernel failure"):
            engine.generate([330], GREEDY)
        assert engine.generate([340], SamplingParams(temperature=0.0, max_tokens=2)).choices[0].token_ids == (341, 342)
        assert engine.stats()["free_pages"] == engine.stats()["total_pages"]


def test_abort_running_queued_and_finished(text):
    with scripted_engine(text, Scripted(counting), max_sequences=1) as engine:
        running, queued = (engine.generate_stream([300], SamplingParams(max_tokens=400)) for _ in range(2))
        next(running)
        for stream in (queued, running):
            stream.abort()
            end = list(stream)[-1]
            assert (end.index, end.reason) == (0, "abort")
            stream.abort()
        assert engine.generate([300], SamplingParams(temperature=0.0, max_tokens=2)).choices[0].token_ids == (301, 302)
        assert engine.stats()["free_slots"] == 1


def test_a_dropped_stream_frees_its_slot(text):
    with scripted_engine(text, Scripted(counting), max_sequences=1) as engine:
        stream = engine.generate_stream([300], SamplingParams(max_tokens=500))
        next(stream)
        del stream
        gc.collect()
        with engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=300)) as left:
            next(left)
        engine.generate([300], SamplingParams(temperature=0.0, max_tokens=2))  # waits for the only slot


def test_stop_strings_end_the_answer_and_are_cut(text):
    with scripted_engine(text, Scripted(counting)) as engine:
        full = engine.generate([300], SamplingParams(temperature=0.0, max_tokens=12)).content
        for start in range(1, len(full) - 4):
            stop = full[start : start + 3]
            cut = full.index(stop)
            result = engine.generate([300], SamplingParams(temperature=0.0, max_tokens=12, stop=[stop, "@@@"]))
            assert (result.content or "") == full[:cut]
            assert result.choices[0].finish_reason == "stop"
            assert result.usage.completion_tokens <= 12
        stream = engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=12, stop=full[3:6]))
        assert [e.stop_string for e in stream if isinstance(e, Finished)] == [full[3:6]]


def test_a_mask_rules_the_tokens_and_its_faults_are_its_own(text):
    def even(ids, channel):
        allowed = np.zeros(768, np.bool_)
        allowed[300:400:2] = True
        return allowed if len(ids) < 4 else None

    def broken(ids, channel):
        raise KeyError("grammar")

    with random_engine(text, max_sequences=4) as engine:
        params = dict(seed=1, max_tokens=8, ignore_eos=True)
        free = engine.generate([300], SamplingParams(**params))
        masked = engine.generate_stream([300], SamplingParams(**params, mask=even))
        failing = engine.generate_stream([300], SamplingParams(**params, mask=broken))
        nothing = engine.generate_stream([300], SamplingParams(**params, mask=lambda i, c: np.zeros(768, np.bool_)))
        wrong = engine.generate_stream([300], SamplingParams(**params, mask=lambda i, c: np.zeros(3, np.bool_)))
        list(masked)
        ids = masked.token_ids[0]
        assert len(ids) == 8
        assert all(300 <= t < 400 and t % 2 == 0 for t in ids[:4])
        for stream, words in ((failing, "grammar"), (nothing, "allows no token"), (wrong, "shape")):
            end = list(stream)[-1]
            assert end.reason == "error"
            assert words in end.error
        assert engine.generate([300], SamplingParams(**params)).choices == free.choices


def test_a_mask_sees_the_right_ids_through_preemption(text):
    """Counts the ids it is shown; a recomputed sequence must show the same prefixes again."""

    def mask(ids, channel):
        allowed = np.zeros(768, np.bool_)
        allowed[[300 + (len(ids) * 7 + sum(ids)) % 90, 500]] = True
        return allowed

    params = SamplingParams(seed=4, max_tokens=30, ignore_eos=True, mask=mask)
    with random_engine(text, max_sequences=6) as engine:
        expected = [engine.generate([20 + i] * 8, params).choices[0].token_ids for i in range(6)]
    with random_engine(text, max_sequences=6, num_pages=22, max_context=80, preempt_bytes=0) as engine:
        results = engine.generate([[20 + i] * 8 for i in range(6)], params)
        assert [r.choices[0].token_ids for r in results] == expected
        assert engine.stats()["preemptions"] > 0


def test_async_streams_share_one_loop(text):
    async def read(engine, first):
        stream = engine.generate_stream([first], SamplingParams(temperature=0.0, max_tokens=5))
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        return stream.token_ids[0]

    async def main():
        with scripted_engine(text, Scripted(counting), max_sequences=4) as engine:
            results = await asyncio.gather(*(read(engine, 300 + i) for i in range(20)))
            assert results == [tuple(range(301 + i, 306 + i)) for i in range(20)]
            async with engine.generate_stream([300], SamplingParams(max_tokens=500)) as stream:
                await anext(aiter(stream))
            assert engine.stats()["total_slots"] == 4

    asyncio.run(main())


def test_close_ends_what_runs_and_refuses_more(text):
    engine = scripted_engine(text, Scripted(counting), max_sequences=1)
    streams = [engine.generate_stream([300], SamplingParams(max_tokens=400)) for _ in range(3)]
    engine.close()
    assert [list(s)[-1].reason for s in streams] == ["abort"] * 3
    with pytest.raises(EngineClosed):
        engine.generate([300])
    engine.close()
    assert not engine_threads()


def test_draining_finishes_what_was_admitted(text):
    engine = scripted_engine(text, Scripted(counting), max_sequences=1)
    streams = [engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=50)) for _ in range(3)]
    engine.close(drain=True)
    assert [list(s)[-1].reason for s in streams] == ["length"] * 3
    assert not engine_threads()


def test_a_forgotten_engine_leaves_no_thread(text):
    engine = scripted_engine(text, Scripted(counting))
    engine.generate([300], SamplingParams(temperature=0.0, max_tokens=2))
    del engine
    gc.collect()
    for thread in engine_threads():
        thread.join(5)
    assert not engine_threads()


def test_a_base_model_generates_and_refuses_to_chat(text, tmp_path):
    for file in text.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    from networks import CONFIG

    from headrace.engine import Engine
    from headrace.engine.config import ModelConfig
    from headrace.tokenizer import load

    with Engine.from_parts(Scripted(counting), ModelConfig.from_json(CONFIG), load(tmp_path)) as engine:
        assert engine.generate([300], SamplingParams(temperature=0.0, max_tokens=1)).choices[0].token_ids == (301,)
        with pytest.raises(RequestError, match="no chat template"):
            engine.chat([{"role": "user", "content": "hello"}])


def test_a_fault_of_the_engine_itself_ends_everything_and_closes_the_door(text, monkeypatch):
    engine = scripted_engine(text, Scripted(counting))

    def broken():
        raise AssertionError("planted fault")

    monkeypatch.setattr(engine._scheduler, "schedule", broken)
    with pytest.raises(GenerationError, match="planted fault"):
        engine.generate([300], GREEDY)
    with pytest.raises(EngineClosed):
        engine.generate([300], GREEDY)
    assert not engine.accepting
    engine.close()
