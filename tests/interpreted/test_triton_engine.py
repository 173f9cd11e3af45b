"""The engine on the Triton kernels, interpreted: the tokens of the reference backend, whatever the steps look like."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from driver import Driver
from networks import random_engine, random_network, text_folder

from headrace.engine import ChatOptions, Engine, SamplingParams

PROMPTS = [[(i * 37 + j * 11) % 700 + 20 for j in range(length)] for i, length in enumerate((11, 3, 17))]
PARAMS = [
    SamplingParams(temperature=temperature, top_p=top_p, seed=i, max_tokens=8, ignore_eos=True, logprobs=i == 1)
    for i, (temperature, top_p) in enumerate([(0.0, 1.0), (0.9, 0.8), (1.3, 1.0)])
]
SMALL = {"max_sequences": 4, "prefill_chunk": 8, "page_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("engine"))


def answers(engine: Engine) -> list[tuple[int, ...]]:
    """Three raw prompts and a conversation whose reasoning is cut after three tokens, all at once."""
    streams = [engine.generate_stream(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    thinking = SamplingParams(temperature=1.0, seed=7, max_tokens=7, reasoning_budget=3, ignore_eos=True)
    streams.append(engine.chat_stream([{"role": "user", "content": "7"}], thinking, ChatOptions()))
    for stream in streams:
        list(stream)
    return [stream.token_ids[0] for stream in streams]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    with random_engine(folder, **SMALL) as engine:
        return answers(engine)


def test_tokens_are_the_references(folder, expected):
    """Prompts cross SSD chunks and prefill chunks, answers cross pages, a budget forces its closing."""
    with random_engine(folder, backend="triton", **SMALL) as engine:
        actual = answers(engine)
        closing = engine.control.end_think
    assert actual == expected
    assert actual[3][3] == closing
    assert closing not in actual[3][:3]
    assert any(len(prompt) // 16 < (len(prompt) + 8) // 16 for prompt in PROMPTS), "nobody crossed a page"


def test_preemption_changes_nothing(folder, expected):
    """Too few pages for all four: somebody is saved and comes back."""
    pool = SMALL | {"page_size": 8, "num_pages": 10, "max_context": 80}
    with random_engine(folder, backend="triton", **pool) as engine:
        assert answers(engine) == expected
        assert engine.stats()["preemptions"] > 0


def test_a_warm_engine_gives_the_same_tokens(folder, expected):
    """Every padded size, prompts and all that the sampler can do, before the first request; nothing is left behind."""
    with random_engine(folder, backend="triton", warm_up=True, **SMALL) as engine:
        caches = engine._loop._runner.caches
        assert not any(t.any() for layers in (caches.keys, caches.values, caches.conv, caches.ssm) for t in layers)
        assert answers(engine) == expected


BF16 = {"dtype": torch.bfloat16, "cache_dtype": "bfloat16"}
CLOSE = 0.05
"""Of two logits. The kernels round what they multiply to bf16, by 2^-9 of it, the reference does not; over five layers
that is about 0.01 of logits whose standard deviation is 1.7."""


def test_bf16_weights_and_caches(folder):
    """Five requests in steps padded to eight give the tokens of each by itself, and those are the reference's most
    likely ones after the same prefix, but for tokens that are closer than rounding can tell."""
    prompts = [[(i * 41 + j * 13) % 700 + 20 for j in range(3 + 4 * i)] for i in range(5)]
    params = [SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=6, ignore_eos=True) for i in range(5)]

    def tokens(which: list[int]) -> list[tuple[int, ...]]:
        streams = [engine.generate_stream(prompts[i], params[i]) for i in which]
        for stream in streams:
            list(stream)
        return [stream.token_ids[0] for stream in streams]

    with random_engine(folder, backend="triton", **BF16, **SMALL | {"max_sequences": 8}) as engine:
        assert engine.sizes.padding == 3
        together = tokens([0, 1, 2, 3, 4])
        for i in (0, 3, 4):
            assert tokens([i]) == [together[i]]
    reference = random_network(dtype=torch.bfloat16)
    margins, gaps = [], []
    for i in (0, 2, 4):
        driver = Driver(reference, 1, dtype=torch.bfloat16)
        logits = driver.step(chunks={0: [*prompts[i], *together[i]]})[len(prompts[i]) - 1 : -1]
        best = logits.topk(2).values
        margins += (best[:, 0] - logits[torch.arange(6), torch.tensor(together[i])]).tolist()
        gaps += (best[:, 0] - best[:, 1]).tolist()
    assert max(margins) < CLOSE
    assert sum(margin > 0 for margin in margins) <= 1
    assert sum(gap > CLOSE for gap in gaps) > 12, "tokens as close as that would prove little"
