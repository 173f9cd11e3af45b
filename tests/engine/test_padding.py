"""Padded decode steps, and the warm-up: nothing of either is seen in a token, a cache or a pool."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from networks import VOCAB, Scripted, random_engine, scripted_engine

from headrace.engine import EngineConfig, SamplingParams
from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL, cache_sizes
from headrace.engine.run import padding
from headrace.engine.run.device import Device
from headrace.engine.run.padding import padded_size, padded_sizes, padding_rows
from headrace.kernels.control import Finish

PROMPTS = [[(i * 37 + j * 11) % 700 + 20 for j in range(1 + 5 * i % 23)] for i in range(17)]
PARAMS = [
    SamplingParams(temperature=(0.0, 0.9, 1.3)[i % 3], top_p=0.8, seed=i, max_tokens=12, ignore_eos=True)
    for i in range(len(PROMPTS))
]


@pytest.fixture
def padded(monkeypatch):
    """Backends that a CPU runs pad their steps too."""
    monkeypatch.setattr(padding, "PADDED_BACKENDS", frozenset({"reference", "native"}))


def answers(engine, count: int) -> list[tuple[int, ...]]:
    streams = [engine.generate_stream(p, params) for p, params in zip(PROMPTS[:count], PARAMS[:count], strict=True)]
    for stream in streams:
        list(stream)
    return [stream.token_ids[0] for stream in streams]


def tokens_of(engine, prompt, params) -> tuple[int, ...]:
    stream = engine.generate_stream(prompt, params)
    list(stream)
    return stream.token_ids[0]


def recorded_sizes(engine) -> set[tuple[int, int]]:
    """(rows, rows with padding) of the decode steps from now on."""
    runner, sizes = engine._loop._runner, set()
    inputs = runner.inputs

    def recording(plan):
        batch, slots = inputs(plan)
        if not plan.chunks:
            sizes.add((len(plan.decode_slots), batch.token_ids.shape[0]))
        return batch, slots

    runner.inputs = recording
    return sizes


def test_the_ladder():
    assert padded_sizes(1) == (1,)
    assert padded_sizes(8) == (1, 2, 4, 8)
    assert padded_sizes(13) == (1, 2, 4, 8, 13)
    assert padded_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    for most in range(1, 70):
        needed = []
        for rows in range(1, most + 1):
            size = padded_size(rows, most)
            assert rows <= size <= most
            assert size in padded_sizes(most)
            needed.append(size - rows)
        assert padding_rows("triton", most) == max(needed) < 8
        assert padding_rows("reference", most) == 0
    assert padded_size(0, 64) == 0


@pytest.fixture(scope="module")
def alone(text):
    """Each request by itself, no step padded."""
    with random_engine(text, max_sequences=1) as engine:
        return [tokens_of(engine, p, params) for p, params in zip(PROMPTS, PARAMS, strict=True)]


def test_padded_batches_of_every_size(text, alone, padded):
    with random_engine(text, max_sequences=len(PROMPTS)) as engine:
        sizes = recorded_sizes(engine)
        for count in range(1, len(PROMPTS) + 1):
            assert answers(engine, count) == list(alone[:count])
    assert {(5, 8), (9, 16), (12, 16), (16, 16), (17, 17)} <= sizes
    assert {size for _, size in sizes} <= {0, *padded_sizes(len(PROMPTS))}


def test_padding_stays_where_it_is(text, alone, padded):
    """Its slots do not move on, its rows are in its pages, and nobody's page or slot is touched by it."""
    with random_engine(text, max_sequences=13, num_pages=100, page_size=4) as engine:
        runner = engine._loop._runner
        assert (engine.sizes.padding, len(runner.state.length), len(runner.caches.keys[0])) == (4, 17, 104)
        for tensor in (*runner.caches.keys, *runner.caches.values, *runner.caches.conv, *runner.caches.ssm):
            tensor.fill_(torch.nan)
        before = {f.name: getattr(runner.state, f.name)[13:].clone() for f in fields(runner.state)}
        assert answers(engine, 9) == list(alone[:9])
        for name, values in before.items():
            assert torch.equal(getattr(runner.state, name)[13:], values), name
        assert runner.state.length[13:].tolist() == [1] * 4
        assert runner.state.finish[13:].tolist() == [Finish.LENGTH] * 4
        written = ~runner.caches.keys[0].isnan().flatten(2).any(-1)
        assert written[100:].tolist() == [[True, False, False, False]] * 4, "one token in each of its own pages"
        assert not written[:100].all(1).all(), "pages that nobody held"
        assert (engine.stats()["free_pages"], engine.stats()["free_slots"]) == (100, 13)
        assert all(torch.equal(layer[13], layer[16]) for layer in runner.caches.ssm), "they are all alike"


def test_preemption_and_masks_in_padded_batches(text, padded, monkeypatch):
    """Sequences that are saved and come back with many pages at once; a mask and log-probabilities in their rows."""

    def run(**options):
        with random_engine(text, max_sequences=12, **options) as engine:
            mask = np.arange(VOCAB) % 2 == 1
            masked = SamplingParams(temperature=1.0, seed=9, max_tokens=12, mask=lambda ids, channel: mask)
            rich = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, top_logprobs=3)
            params = [*PARAMS[:8], masked, rich]
            streams = [engine.generate_stream(p, one) for p, one in zip(PROMPTS, params, strict=False)]
            events = [list(stream) for stream in streams]
            logprobs = [one for event in events[9][:-1] for one in event.logprobs]
            return [s.token_ids[0] for s in streams], logprobs, engine.stats()

    tight = {"num_pages": 20, "page_size": 4, "max_context": 60}
    tokens, logprobs, stats = run(**tight)
    assert stats["preemptions"] > 0
    assert all(token % 2 for token in tokens[8])
    assert len(logprobs) > 8
    assert (tokens, logprobs) == run()[:2]
    monkeypatch.setattr(padding, "PADDED_BACKENDS", frozenset())
    assert (tokens, logprobs) == run()[:2]


def test_a_sequence_that_comes_back_with_more_pages_than_rows(text, padded):
    """Its page writes do not change what the padded step looks like."""
    prompts = [[(i * 7 + j) % 700 + 20 for j in range(40)] for i in range(4)]

    def run(num_pages):
        with random_engine(text, max_sequences=4, num_pages=num_pages, max_context=60) as engine:
            runner, launched = engine._loop._runner, []
            step_inputs = runner.kernels.step_inputs

            def recording(*arguments):
                launched.append((arguments[2].shape[0], arguments[3].shape[0], arguments[5].shape[0]))
                return step_inputs(*arguments)

            runner.kernels = replace(runner.kernels, step_inputs=recording)
            streams = [engine.generate_stream(one, params) for one, params in zip(prompts, PARAMS, strict=False)]
            for stream in streams:
                list(stream)
            return [stream.token_ids for stream in streams], launched

    expected, _ = run(256)
    tokens, launched = run(24)
    assert tokens == expected
    assert any(decodes == prompts == 0 < writes for decodes, prompts, writes in launched), "none came back so"
    assert all(writes == decodes for decodes, prompts, writes in launched if decodes and not prompts)


def test_a_failing_step_leaves_padding_in_order(text, padded):
    network = Scripted(lambda token: token + 1)
    with scripted_engine(text, network, max_sequences=8) as engine:
        params = SamplingParams(temperature=0, max_tokens=20)
        expected = tokens_of(engine, [100], params)
        network.poison = {0, 205}  # also what padding rows compute: it is nobody's
        streams = [engine.generate_stream([start], params) for start in (100, 200, 300, 400, 500)]
        ends = [list(stream)[-1].reason for stream in streams]
        assert ends == ["length", "error", "length", "length", "length"]
        assert streams[0].token_ids[0] == expected
        network.fail_on = 103
        with pytest.raises(Exception, match="planted"):
            engine.generate([100], params)
        network.fail_on = None
        assert tokens_of(engine, [100], params) == expected


def test_the_sizing_counts_padding(padded, monkeypatch):
    config, page = ModelConfig.load(EMBEDDED_MODEL), 16
    device = Device("cpu")
    monkeypatch.setattr(device, "available_bytes", lambda: 1 << 30)
    sizes = cache_sizes(config, EngineConfig(max_sequences=16, page_size=page, cache_bytes=1 << 20), device)
    assert (sizes.num_slots, sizes.padding) == (16, 7)
    assert sizes.num_pages == (1 << 20) // sizes.page_bytes - 7
    few = (sizes.num_pages + 6) * sizes.page_bytes
    monkeypatch.setattr(device, "available_bytes", lambda: few + 40 * sizes.slot_bytes)
    enough = few // sizes.page_bytes + 40 * sizes.slot_bytes // sizes.page_bytes - 7
    for pages, fits in ((enough, True), (enough + 2, False)):
        options = EngineConfig(max_sequences=16, page_size=page, num_pages=pages)
        if fits:
            assert cache_sizes(config, options, device).num_pages == pages
        else:
            with pytest.raises(ValueError, match="with 7 for padding rows"):
                cache_sizes(config, options, device)
    monkeypatch.setattr(device, "available_bytes", lambda: 2 * 22 * sizes.slot_bytes)
    with pytest.raises(ValueError, match="max_sequences 16 needs .* with 7 for padding rows"):
        cache_sizes(config, EngineConfig(max_sequences=16, page_size=page), device)


def test_one_copy_back(text):
    """Tokens, phases and ends of a step travel together; log-probabilities beside them, where they are wanted."""
    with random_engine(text) as engine:
        device, copies = engine._loop._runner.device, []
        download = device.download
        device.download = lambda tensor: copies.append(tensor.shape) or download(tensor)
        engine.generate(PROMPTS[1], SamplingParams(max_tokens=5, ignore_eos=True))
        assert copies == [(3, 1)] * 5
        copies.clear()
        engine.generate(PROMPTS[1], SamplingParams(max_tokens=5, ignore_eos=True, top_logprobs=2))
        assert copies == [(3, 1), (1,), (1, 2), (1, 2)] * 5


def memory_of(runner) -> dict[str, torch.Tensor]:
    caches = {f"{f.name} {i}": t for f in fields(runner.caches) for i, t in enumerate(getattr(runner.caches, f.name))}
    return caches | {f.name: getattr(runner.state, f.name) for f in fields(runner.state)} | {"table": runner.page_table}


@pytest.mark.parametrize("pages", [256, 16])
def test_a_warm_engine_is_as_fresh_as_a_cold_one(text, padded, pages):
    """Also where there are fewer pages than the warm-up's sequences would have."""
    options = {"max_sequences": 17, "num_pages": pages, "page_size": 4, "max_context": 64}
    with random_engine(text, **options) as cold, random_engine(text, warm_up=True, **options) as warm:
        after = memory_of(warm._loop._runner)
        for name, tensor in memory_of(cold._loop._runner).items():
            assert torch.equal(tensor, after[name]), name
        assert not warm._loop._runner._prompts
        assert warm.stats() == cold.stats()
        assert answers(warm, 11) == answers(cold, 11)


def test_the_warm_up_runs_every_size(text):
    """Each padded size, one row with each thing that a sampler may be asked for, prompts up to a full step."""
    network = Scripted(lambda token: token + 1)
    with scripted_engine(text, network, max_sequences=20, warm_up=True):
        variants = 4 + 20
        assert network.rows_seen == [1, 2, 4, 8, 16, 20] + [1] * variants + [1, 2, 4, 8, 16, 32, 36]
    cold = Scripted(lambda token: token + 1)
    with scripted_engine(text, cold, max_sequences=20):
        assert cold.rows_seen == []


def test_when_an_engine_warms_up():
    assert not EngineConfig().warms_up
    assert EngineConfig(device="cuda").warms_up
    assert not EngineConfig(device="cuda", warm_up=False).warms_up
    assert EngineConfig(warm_up=True).warms_up
    for bad in (1, 0, "yes"):
        with pytest.raises(ValueError, match="warm_up must be"):
            EngineConfig(warm_up=bad)
