"""Every accepted request gets exactly one end, whatever fails; and what an end leaves behind."""

import gc
import threading
import time

import numpy as np
import pytest
from networks import Scripted, scripted_engine

from headrace.engine import Finished, GenerationError, QueueFull, SamplingParams, loop
from headrace.tokenizer import StopMatcher, TextStream


def counting(token):
    """Counts up for ever through ids 300..399."""
    return 300 + (token - 299) % 100


def read(stream):
    """All events, or a failure if the stream never ends."""
    events = []
    thread = threading.Thread(target=lambda: events.extend(stream), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the stream never ends"
    return events


@pytest.mark.parametrize(("method", "after"), [("push", 1), ("push", 5), ("finish", 0)])
def test_text_that_raises_on_the_engine_thread_ends_its_request(text, monkeypatch, method, after):
    made, calls = getattr(TextStream, method), []

    def failing(stream, *args):
        if stream._content._matcher is not None:
            calls.append(1)
            if len(calls) > after:
                raise ValueError("planted")
        return made(stream, *args)

    monkeypatch.setattr(TextStream, method, failing)
    with scripted_engine(text, Scripted(counting)) as engine:
        neighbour = engine.generate_stream([310], SamplingParams(temperature=0.0, max_tokens=30))
        stream = engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=8, stop=["@@@"]))
        events = read(stream)
        ends = [event for event in events if isinstance(event, Finished)]
        assert [(end.reason, end.failure) for end in ends] == [("error", "text")]
        assert events[-1] is ends[0]
        assert read(neighbour)[-1].reason == "length"
        stats = engine.stats()
        assert stats["free_slots"] == stats["total_slots"]


def test_a_failing_step_tells_neighbours_from_one_that_was_alone(text):
    network = Scripted(counting)
    network.fail_on = 333
    gate = threading.Event()
    forward = network.forward

    def gated(batch, caches):
        gate.wait(20)
        return forward(batch, caches)

    network.forward = gated
    with scripted_engine(text, network) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=50)
        streams = [engine.generate_stream([token], params) for token in (320, 360)]
        gate.set()
        assert [read(stream)[-1].failure for stream in streams] == ["neighbours"] * 2
        assert read(engine.generate_stream([330], params))[-1].failure == "step"
        with pytest.raises(GenerationError, match="planted kernel failure"):  # who runs the engine is told all
            engine.generate([330], params)


def test_other_failures_have_their_kind(text):
    network = Scripted(counting)
    network.poison = {305}
    with scripted_engine(text, network) as engine:
        assert read(engine.generate_stream([303], SamplingParams(temperature=0.0)))[-1].failure == "logits"
        nothing = SamplingParams(temperature=0.0, mask=lambda ids, channel: np.zeros(3, np.bool_))
        assert read(engine.generate_stream([320], nothing))[-1].failure == "mask"
        done = read(engine.generate_stream([320], SamplingParams(temperature=0.0, max_tokens=1)))[-1]
        assert (done.reason, done.failure) == ("length", None)


def test_several_prompts_are_taken_together_or_not_at_all(text):
    params = SamplingParams(temperature=0.0, max_tokens=4)
    with scripted_engine(text, Scripted(counting), max_sequences=1, max_waiting=1) as engine:
        streams = engine.generate_streams([[300], [310], [320], [330]], params)
        assert [read(stream)[-1].reason for stream in streams] == ["length"] * 4
        assert [stream.token_ids[0][0] for stream in streams] == [301, 311, 321, 331]
        long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
        with engine.generate_stream([300], long) as running:
            next(running)
            before = len(engine._loop._live)
            with pytest.raises(QueueFull):
                engine.generate_streams([[310], [320]], params)
            assert len(engine._loop._live) == before == 1


def test_close_does_not_wait_for_ever(text, monkeypatch):
    monkeypatch.setattr(loop, "STEP_SECONDS", 0.3)
    network = Scripted(counting)
    entered, release = threading.Event(), threading.Event()
    forward = network.forward

    def hanging(batch, caches):
        entered.set()
        release.wait(20)
        return forward(batch, caches)

    network.forward = hanging
    engine = scripted_engine(text, network)
    assert engine.step_seconds == 0
    stream = engine.generate_stream([300], SamplingParams(temperature=0.0))
    assert entered.wait(20)
    with pytest.raises(TimeoutError, match="0.3 seconds"):
        engine.close(drain=True, timeout=0.1)
    assert engine.step_seconds > 0.3
    release.set()
    assert read(stream)[-1].reason == "abort"
    engine.close()
    assert engine.step_seconds == 0


def test_nothing_of_a_request_is_kept_by_an_idle_engine(text):
    """Its stop strings, and its prompt's ids: a thread that sleeps holds its last mail no longer."""

    def kept():
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) in (StopMatcher, loop.Sequence)]

    others = {id(thing) for thing in kept()}  # of engines of other tests
    with scripted_engine(text, Scripted(counting)) as engine:
        stream = engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=9, n=3, stop=["@@@"]))
        next(stream)
        ours = [type(thing) for thing in kept() if id(thing) not in others]
        assert (ours.count(StopMatcher), ours.count(loop.Sequence)) == (1, 3)  # one for all choices
        assert read(stream)[-1].reason == "length"
        del stream
        engine.generate([300], SamplingParams(temperature=0.0, max_tokens=1))
        with engine.generate_stream([300], SamplingParams(temperature=0.0, max_tokens=400, stop=["@@@"])) as left:
            next(left)
        assert read(left)[-1].reason == "abort"
        del left
        deadline = time.monotonic() + 20  # the engine thread may still be on its way to sleep
        while not {id(thing) for thing in kept()} <= others:
            assert time.monotonic() < deadline
