"""Rows of the contract that need the real model, over a real socket: what fields do to prompt and answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import LiveServer, joined, live

from headrace.engine import Engine, EngineConfig
from headrace.engine.serve.profiles import OPENAI

USER = {"role": "user", "content": "What is 12 + 34?"}
GREEDY: dict[str, Any] = {"messages": [USER], "temperature": 0, "max_tokens": 200}
OPEN = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think></think>"


@pytest.fixture(scope="module")
def openai_real(real_shared: tuple[Engine, LiveServer]) -> Iterator[LiveServer]:
    """The same engine behind the other profile."""
    with live(real_shared[0], profile=OPENAI) as server:
        yield server


def prompt_of(server: LiveServer, **fields: Any) -> str:
    """The prompt as text, which the answer's own token ids must agree with."""
    response = server.client.post("/tokenize", json={"return_token_strs": True} | fields)
    assert response.status_code == 200, response.text
    text = server.client.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["prompt"]
    answer = server.chat(**fields, max_tokens=1, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == response.json()["tokens"]
    return text


def message(server: LiveServer, **fields: Any) -> dict[str, Any]:
    response = server.chat(**GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "expected"), [
    ([{"role": "context", "content": "Facts."}, USER], "<|im_start|>user\nFacts.\n\nWhat is 12 + 34?<|im_end|>"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
     "<|im_start|>user\nab<|im_end|>"),
    ([{"role": "user", "content": "x", "name": "Ann"}], "<|im_start|>user\nx<|im_end|>"),
    ([{"role": "system", "content": "Be brief."}, USER], "<|im_start|>system\nBe brief.<|im_end|>"),
])  # fmt: skip
def test_how_messages_are_rendered(real: LiveServer, messages: list[Any], expected: str) -> None:
    assert expected in prompt_of(real, messages=messages)


@pytest.mark.parametrize("turn", [
    {"role": "assistant", "content": "46", "reasoning_content": "Adding."},
    {"role": "assistant", "content": "46", "reasoning": "Adding."},
    {"role": "assistant", "content": "<think>\nAdding.\n</think>\n46"},
])  # fmt: skip
def test_reasoning_in_the_history_has_three_spellings(real: LiveServer, turn: dict[str, Any]) -> None:
    messages = [USER, turn, USER]
    kept = prompt_of(real, messages=messages, chat_template_kwargs={"truncate_history_thinking": False})
    assert "<think>\nAdding.\n</think>\n46<|im_end|>" in kept
    dropped = prompt_of(real, messages=messages)
    assert "Adding." not in dropped
    assert "<think></think>46<|im_end|>" in dropped.replace("<think></think>\n46", "<think></think>46")


@pytest.mark.parametrize(("fields", "ends", "low"), [
    ({}, OPEN, False), ({"reasoning_effort": "high"}, OPEN, False), ({"reasoning_effort": "low"}, OPEN, True),
    ({"reasoning_effort": "none"}, CLOSED, False),
    ({"chat_template_kwargs": {"enable_thinking": False}}, CLOSED, False),
    ({"chat_template_kwargs": {"low_effort": True}}, OPEN, True),
    ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, CLOSED, False),
    ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, OPEN, False),
    ({"reasoning_effort": "low", "chat_template_kwargs": {"low_effort": False}}, OPEN, False),
    ({"chat_template_kwargs": {"reasoning_budget": 77}}, OPEN, False),
])  # fmt: skip
def test_efforts_and_who_wins(real: LiveServer, fields: dict[str, Any], ends: str, low: bool) -> None:
    prompt = prompt_of(real, messages=[USER], **fields)
    assert prompt.endswith(ends)
    assert ("34?\n\n{reasoning effort: low}<|im_end|>" in prompt) is low
    assert "77" not in prompt


@pytest.mark.parametrize(("effort", "same"), [
    ("minimal", "low"), ("medium", "high"), ("xhigh", "high"), ("max", "high"), ("none", "none"),
])  # fmt: skip
def test_efforts_of_the_openai_profile(openai_real: LiveServer, effort: str, same: str) -> None:
    assert prompt_of(openai_real, messages=[USER], reasoning_effort=effort) == prompt_of(
        openai_real, messages=[USER], reasoning_effort=same
    )


def test_roles_of_the_openai_profile(openai_real: LiveServer, real: LiveServer) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, USER, USER]
    prompt = prompt_of(openai_real, messages=messages)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt
    assert prompt.count("What is 12 + 34?") == 2
    assert real.chat(messages=messages).status_code == 422


# --- budgets and limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "reasoning"), [
    ({"reasoning_budget": 0}, 0), ({"reasoning_budget": 3}, 3), ({"reasoning_effort": "none"}, 0),
    ({"reasoning_budget": 9, "chat_template_kwargs": {"reasoning_budget": 2}}, 2),
    ({"reasoning_effort": "none", "reasoning_budget": 5}, 0),
])  # fmt: skip
def test_the_three_offs_and_the_budget_that_wins(real: LiveServer, fields: dict[str, Any], reasoning: int) -> None:
    body = real.chat(**GREEDY | fields | {"max_tokens": 12}).json()
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == reasoning


def test_minus_one_sets_no_limit(real: LiveServer) -> None:
    free = message(real, reasoning_budget=-1)
    assert free == message(real)  # it thinks for less than the default
    assert free["reasoning_content"] != message(real, reasoning_budget=3)["reasoning_content"]


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_inside_thinking(real: LiveServer, stream: bool) -> None:
    fields = GREEDY | {"max_tokens": 4}
    if stream:
        *chunks, last = real.chunks(**fields, stream_options={"include_usage": True})
        content, reasoning = joined(chunks, 0, "content"), joined(chunks, 0, "reasoning_content")
        reason, usage = chunks[-1]["choices"][0]["finish_reason"], last["usage"]
    else:
        body = real.chat(**fields).json()
        [choice], usage = body["choices"], body["usage"]
        content, reasoning = choice["message"]["content"], choice["message"]["reasoning_content"]
        reason = choice["finish_reason"]
    assert (content, reason) == (None, "length")
    assert reasoning
    assert usage["completion_tokens"] == usage["completion_tokens_details"]["reasoning_tokens"] == 4


def test_force_nonempty_content(real: LiveServer) -> None:
    cut = message(real, max_tokens=4, chat_template_kwargs={"force_nonempty_content": True})
    assert cut["content"]
    whole = message(real, chat_template_kwargs={"force_nonempty_content": True})
    assert whole == message(real)


def test_force_nonempty_content_is_cut_as_an_answer_is(real: LiveServer) -> None:
    """By the stop that is complete first, which need not be the one that begins first."""
    kwargs = {"force_nonempty_content": True}
    text = message(real, max_tokens=16, chat_template_kwargs=kwargs)["content"]
    assert len(text) > 5
    cut = message(real, max_tokens=16, chat_template_kwargs=kwargs, stop=[text[:5], text[1:3]])
    assert cut["content"] == text[:1]


def test_the_limit_is_clamped_to_the_room(real_engine: Engine) -> None:
    with Engine(config=EngineConfig(max_sequences=1, max_context=64)) as engine, live(engine) as server:
        body = server.chat(messages=[USER], ignore_eos=True, max_tokens=32768).json()
        assert body["usage"]["total_tokens"] == 64
        assert body["choices"][0]["finish_reason"] == "length"


# --- stops ----------------------------------------------------------------------------------------------------------


def test_stops_act_on_the_answer_alone(real: LiveServer) -> None:
    whole = message(real)
    shared = next(c for c in whole["content"][1:] if c in whole["reasoning_content"])
    for stop in (shared, [shared, "never"], ["never", whole["content"][0:3] + "nor this", shared]):
        body = real.chat(**GREEDY, stop=stop).json()["choices"][0]
        assert body["message"]["reasoning_content"] == whole["reasoning_content"]
        assert (body["message"]["content"] or "") == whole["content"][: whole["content"].index(shared)]
        assert body["finish_reason"] == "stop"
        chunks = real.chunks(**GREEDY, stop=stop)
        assert joined(chunks, 0, "content") == body["message"]["content"]
        assert joined(chunks, 0, "reasoning_content") == whole["reasoning_content"]


def test_the_earliest_match_wins_over_any_split(real: LiveServer) -> None:
    whole = message(real)["content"]
    for start in range(1, min(len(whole), 6)):
        for end in range(start + 1, min(len(whole), start + 5) + 1):
            stop = whole[start:end]
            got = message(real, stop=[whole[start + 1 :] + "?", stop])["content"] or ""
            assert got == whole[: whole.index(stop)]


# --- the same tokens ------------------------------------------------------------------------------------------------


# A text the model has no opinion on, drawn from without a nucleus: there is something to differ in.
DRAWN: dict[str, Any] = {"prompt": "The cards", "max_tokens": 16, "top_p": 1, "return_token_ids": True}


def drawn(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    response = server.client.post("/v1/completions", json=DRAWN | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def test_a_seeded_request_is_the_same_in_company(real: LiveServer) -> None:
    alone = drawn(real, seed=2**64 - 1, n=2, logprobs=3)
    ids = [choice["token_ids"] for choice in alone]
    assert ids[0] != ids[1]  # choices of one seed differ
    assert drawn(real, seed=2**64 - 1)[0]["token_ids"] == ids[0]
    assert drawn(real, seed=2**64 - 2)[0]["token_ids"] != ids[0]
    company = [{"prompt": ["Hello", "x"]}, {"seed": 2**64 - 1, "n": 2, "logprobs": 3}]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda fields: drawn(real, **fields), company))[1] == alone


def test_without_a_seed_draws_differ(real: LiveServer) -> None:
    assert len({tuple(choice["token_ids"]) for _ in range(2) for choice in drawn(real, n=2)}) > 1


def test_logprobs_cover_what_is_returned(real: LiveServer) -> None:
    body = real.chat(**GREEDY, logprobs=True, top_logprobs=2, return_token_ids=True).json()
    choice = body["choices"][0]
    for key in ("content", "reasoning_content"):
        entries = choice["logprobs"][key]
        text = bytes(b for entry in entries for b in entry["bytes"]).decode()
        assert text.strip() == choice["message"][key].strip()
        for entry in entries:
            assert entry["logprob"] <= 0
            assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
            assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]  # greedy takes the likeliest
