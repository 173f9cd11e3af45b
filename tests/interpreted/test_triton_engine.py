"""The engine on the Triton kernels, interpreted: the tokens of the reference backend, whatever the steps look like."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from networks import random_engine, text_folder

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
