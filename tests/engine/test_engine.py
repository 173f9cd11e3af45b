"""The engine's public behaviour: ends, errors, stops, masks, streams, life."""

import asyncio
import contextlib
import gc
import threading

import numpy as np
import pytest
from networks import CONFIG, EOS, Scripted, random_engine, scripted_engine

from headrace.engine import (
    ContextExceeded,
    Engine,
    EngineClosed,
    EngineConfig,
    Finished,
    GenerationError,
    QueueFull,
    RequestError,
    SamplingParams,
)
from headrace.engine.config import ModelConfig
from headrace.tokenizer import load as load_tokenizer

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
        assert len(engine.generate([[300]] * 2500, SamplingParams(temperature=0.0, max_tokens=1))) == 2500
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


def test_numbers_of_numpy_are_numbers():
    params = SamplingParams(temperature=np.float32(0.5), seed=np.int64(3), max_tokens=np.int32(7), top_p=1)
    assert (params.temperature, params.seed, params.max_tokens, params.top_p) == (0.5, 3, 7, 1.0)
    assert {type(v) for v in (params.temperature, params.seed, params.max_tokens)} == {float, int}


def test_errors_cross_processes():
    import pickle

    for error in (RequestError("no", param="seed", code="c"), ContextExceeded(9, 8, "prompt"), QueueFull(3, 2)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


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
        {"device": "cuda:x"},
        {"backend": "native", "device": "cuda"},
        {"backend": "triton"},
        {"cache_dtype": "float64"},
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
        for prompt in ([300, -1], [300, 1.5], [300, True], b"12", {"a": 1}, 3, None):
            with pytest.raises(RequestError) as caught:
                engine.generate_stream(prompt)
            assert caught.value.param == "prompt"
        with pytest.raises(ContextExceeded) as caught:
            engine.chat([{"role": "user", "content": "12 + 34 " * 9}])
        assert caught.value.param == "messages"
        result = engine.generate([300] * 31, GREEDY)  # the limit is clamped to the room
        assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (1, "length")
        result = engine.generate([300] * 5, GREEDY)
        assert result.usage.completion_tokens == 27
    with pytest.raises(ValueError, match="max_batched_tokens"):
        scripted_engine(text, Scripted(counting), max_batched_tokens=16)
    for options, words in [
        ({"num_pages": 8, "max_context": 100}, "8 pages of 4 tokens hold 32, less than max_context 100"),
        ({"max_context": 513}, "max_context 513 is more than the model's 512"),
        ({"num_pages": None, "cache_bytes": 100}, "cache_bytes 100 holds no page"),
        ({"num_pages": 10**12}, "num_pages 1000000000000 needs"),
        ({"max_sequences": 10**9}, "max_sequences 1000000000 needs"),
    ]:
        with pytest.raises(ValueError, match=words):
            scripted_engine(text, Scripted(counting), **options)
    with pytest.raises(ValueError, match="control id 13 is outside"):
        Engine.from_parts(Scripted(counting), ModelConfig.from_json({**CONFIG, "vocab_size": 13}), load_tokenizer(text))
    narrow = ModelConfig.from_json({**CONFIG, "vocab_size": 200})
    engine = Engine.from_parts(Scripted(lambda t: 20, vocab=200), narrow, load_tokenizer(text))
    with engine, pytest.raises(RequestError, match="vocabulary is 200"):
        engine.generate("What is this?")


def test_a_full_queue_refuses_and_disturbs_nobody(text):
    with scripted_engine(text, Scripted(counting), max_sequences=1, max_waiting=2) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=100)
        first = engine.generate_stream([300], params)
        others = [engine.generate_stream([310], params) for _ in range(2)]  # one runs, two wait
        with pytest.raises(QueueFull, match="2 sequences are waiting") as caught:
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


def test_one_failure_among_many_prompts_leaves_the_others(text):
    network = Scripted(counting)
    network.poison = {333}
    with scripted_engine(text, network) as engine:
        results = engine.generate([[300], [332], [340]], SamplingParams(temperature=0.0, max_tokens=4))
        assert [r.choices[0].finish_reason for r in results] == ["length", "error", "length"]
        assert "not finite" in results[1].choices[0].error


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


def wait_for_free_slots(engine, slots):
    """Steps of a neighbour that runs on until the slots are free again; fails if they never are."""
    with engine.generate_stream([350], SamplingParams(temperature=0.0, max_tokens=400)) as neighbour:
        for _ in neighbour:
            if engine.stats()["free_slots"] == slots - 1:
                return
    raise AssertionError("the slot was not freed while the neighbour decoded 400 tokens")


def test_a_dropped_stream_frees_its_slot(text):
    with scripted_engine(text, Scripted(counting), max_sequences=3, num_pages=1024) as engine:
        params = SamplingParams(max_tokens=500)
        stream = engine.generate_stream([300], params)
        next(stream)
        del stream
        gc.collect()
        wait_for_free_slots(engine, 3)
        with engine.generate_stream([300], params) as left:
            next(left)
        wait_for_free_slots(engine, 3)
        assert list(left)[-1].reason == "abort"


def test_an_interrupted_chat_stops_its_request(text, monkeypatch):
    """As in a notebook, where the exception, and with it the stream, is kept."""
    from headrace.engine import stream as streams

    def interrupt(self, event):
        raise KeyboardInterrupt

    monkeypatch.setattr(streams.Collector, "add", interrupt)
    with scripted_engine(text, Scripted(counting), max_sequences=2, num_pages=1024) as engine:
        with pytest.raises(KeyboardInterrupt) as kept:
            engine.generate([300], SamplingParams(max_tokens=500))
        assert kept.value is not None
        wait_for_free_slots(engine, 2)


def test_stop_strings_end_the_answer_and_are_cut(text):
    with scripted_engine(text, Scripted(counting)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=12)
        full = engine.generate([300], params)
        sizes = [len(engine.tokenizer.decode(full.choices[0].token_ids[: n + 1])) for n in range(12)]
        for start in range(1, len(full.content) - 4):
            stop = full.content[start : start + 3]
            cut = full.content.index(stop)
            result = engine.generate([300], SamplingParams(temperature=0.0, max_tokens=12, stop=[stop, "@@@"]))
            assert (result.content or "") == full.content[:cut]
            assert (result.choices[0].finish_reason, result.choices[0].stop_string) == ("stop", stop)
            # The token that completes the stop is the last one that counts.
            assert result.usage.completion_tokens == next(n + 1 for n, size in enumerate(sizes) if size >= cut + 3)


def test_a_stop_ends_the_sequence_within_a_step_though_nobody_reads(text):
    with scripted_engine(text, Scripted(counting), num_pages=1024) as engine:
        full = engine.generate([300], SamplingParams(temperature=0.0, max_tokens=12)).content
        before = engine.stats()["steps"]
        stream = engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=400, stop=full[3:6]))
        engine.close(drain=True)  # returns when the unread stream has ended
        end = list(stream)[-1]
        assert end.stop_string == full[3:6]
        assert engine.stats()["steps"] - before <= end.usage.completion_tokens + 1


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
        for stream, words in ((failing, "grammar"), (nothing, "allows no token"), (wrong, "must be bool")):
            end = list(stream)[-1]
            assert end.reason == "error"
            assert words in end.error
        assert engine.generate([300], SamplingParams(**params)).choices == free.choices


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()])
def test_a_mask_cannot_take_the_engine_down(text, error):
    def mask(ids, channel):
        raise error

    with scripted_engine(text, Scripted(counting)) as engine:
        with pytest.raises(GenerationError, match="the mask failed"):
            engine.generate([300], SamplingParams(mask=mask))
        assert engine.generate([300], SamplingParams(temperature=0.0, max_tokens=1)).content


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
            assert engine.stats()["free_slots"] == 4

    asyncio.run(main())


def test_a_stream_may_be_read_in_turn_by_loops_and_threads(text):
    """Each reader hears of what arrives while it waits: no ``aiter`` needed, none of the old one's left over."""
    gate = threading.Semaphore(0)  # four tokens for every read: some of them may wait for the rest of a character

    async def two(stream):
        return [gate.release(4) or await anext(stream) for _ in range(2)]

    with scripted_engine(text, Scripted(counting, gate=gate)) as engine:
        stream = engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=60))
        for _ in range(3):
            asyncio.run(asyncio.wait_for(two(stream), 20))
            gate.release(4)
            next(stream)
        gate.release(60)
        assert list(stream)[-1].reason == "length"
        assert stream.token_ids[0] == tuple(300 + i % 100 for i in range(1, 61))


def test_an_engine_keeps_no_closed_loop_alive(text):
    import weakref

    async def read(engine):
        stream = engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=2))
        assert [event async for event in stream]
        return weakref.ref(asyncio.get_running_loop())

    with scripted_engine(text, Scripted(counting)) as engine:
        loops = [asyncio.run(read(engine)) for _ in range(3)]
        gc.collect()
        assert [loop() for loop in loops] == [None] * 3


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
    for _ in range(20):
        engine = scripted_engine(text, Scripted(counting), max_sequences=1)
        streams = [engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=5)) for _ in range(3)]
        engine.close(drain=True)
        assert [list(s)[-1].reason for s in streams] == ["length"] * 3
    assert not engine_threads()


def test_a_drain_can_be_cut_by_time_or_by_a_second_close(text):
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    engine = scripted_engine(text, Scripted(counting), num_pages=1024)
    stream = engine.generate_stream([300], params)
    engine.close(drain=True, timeout=0.0)
    assert list(stream)[-1].reason in ("abort", "length")

    network = Scripted(counting)
    engine = scripted_engine(text, network, num_pages=1024)
    entered, release = threading.Event(), threading.Event()
    forward = network.forward

    def slow(batch, caches):
        entered.set()
        release.wait(20)
        return forward(batch, caches)

    network.forward = slow
    stream = engine.generate_stream([300], params)
    assert entered.wait(20)
    drain = threading.Thread(target=engine.close, kwargs={"drain": True})
    drain.start()
    cut = threading.Thread(target=engine.close)
    cut.start()
    release.set()
    cut.join(20)
    drain.join(20)
    assert not drain.is_alive()
    assert list(stream)[-1].reason == "abort"
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
    model = ModelConfig.from_json(CONFIG)
    with Engine.from_parts(Scripted(counting), model, load_tokenizer(tmp_path)) as engine:
        assert engine.generate([300], SamplingParams(temperature=0.0, max_tokens=1)).choices[0].token_ids == (301,)
        with pytest.raises(RequestError, match="no chat template"):
            engine.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("fault", [AssertionError("planted fault"), SystemExit("planted fault")])
@pytest.mark.parametrize("where", ["schedule", "submit", "commit"])
def test_a_fault_of_the_engine_itself_ends_everything_and_closes_the_door(text, monkeypatch, fault, where):
    engine = scripted_engine(text, Scripted(counting))

    def broken(*args):
        raise fault

    monkeypatch.setattr(engine._scheduler, where, broken)
    streams = [engine.generate_stream([300], GREEDY)]
    with contextlib.suppress(EngineClosed):  # the thread may be gone before these arrive
        streams += [engine.generate_stream([300], GREEDY) for _ in range(5)]
    for stream in streams:
        assert "planted fault" in list(stream)[-1].error
    with pytest.raises(EngineClosed, match="planted fault"):
        engine.generate([300], GREEDY)
    assert not engine.accepting
    engine.close()
