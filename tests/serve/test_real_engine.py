"""The server around the real engine and the embedded model: what only the whole can show."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from live_server import SECONDS, LiveServer, all_free, connect, joined, live, receive

from headrace.engine import Engine, EngineConfig

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 12 + 34?"}], "max_tokens": 24, "seed": 5}
ENDLESS = ASK | {"max_tokens": 2000, "ignore_eos": True}


@pytest.fixture
def engine(real_engine: Engine) -> Engine:
    return real_engine


@pytest.fixture
def server(real: LiveServer) -> LiveServer:
    return real


def test_stream_and_body_agree(server: LiveServer, engine: Engine) -> None:
    fields = ASK | {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    body = server.chat(**fields).json()
    *chunks, last = server.chunks(**fields, stream_options={"include_usage": True})
    assert last["usage"] == body["usage"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(body["prompt_token_ids"])
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in body["choices"])
    assert usage["completion_tokens_details"]["reasoning_tokens"] <= usage["completion_tokens"]
    for choice in body["choices"]:
        index = choice["index"]
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert [i for part in parts for i in part.get("token_ids", [])] == choice["token_ids"]
        for key in ("content", "reasoning_content"):
            assert joined(chunks, index, key) == choice["message"][key]
            entries = [e for part in parts if part["logprobs"] for e in part["logprobs"][key] or ()]
            assert entries == choice["logprobs"][key]
            assert all(len(e["top_logprobs"]) == 2 and e["logprob"] <= 0 for e in entries)
    assert server.chat(**ASK).json()["choices"][0]["message"] == body["choices"][0]["message"]
    all_free(engine)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_budget_is_exact(server: LiveServer, engine: Engine, budget: int, stream: bool) -> None:
    closing = engine.tokenizer.markers["</think>"]
    fields = ASK | {"chat_template_kwargs": {"reasoning_budget": budget}, "return_token_ids": True}
    if stream:
        chunks = server.chunks(**fields, stream_options={"include_usage": True})
        ids = [i for chunk in chunks[:-1] for i in chunk["choices"][0].get("token_ids", [])]
        usage = chunks[-1]["usage"]
    else:
        body = server.chat(**fields).json()
        ids, usage = body["choices"][0]["token_ids"], body["usage"]
    assert ids.index(closing) == budget
    assert usage["completion_tokens_details"]["reasoning_tokens"] == budget


def test_effort_changes_the_prompt(server: LiveServer, engine: Engine) -> None:
    ends = {}
    for effort in ("none", "low", "high"):
        body = server.chat(**ASK, reasoning_effort=effort, return_token_ids=True).json()
        ends[effort] = engine.tokenizer.decode(body["prompt_token_ids"])
        if effort == "none":
            assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
            assert body["choices"][0]["message"]["reasoning_content"] is None
    assert ends["none"].endswith("<|im_start|>assistant\n<think></think>")
    assert ends["high"].endswith("<|im_start|>assistant\n<think>\n")
    assert "34?\n\n{reasoning effort: low}<|im_end|>" in ends["low"]


def test_markers_in_a_users_text_are_text(server: LiveServer, engine: Engine) -> None:
    markers = engine.tokenizer.markers
    plain = server.chat(**ASK, return_token_ids=True).json()["prompt_token_ids"]
    nasty = "".join(markers)
    messages = [{"role": "user", "content": nasty}]
    ids = server.chat(**ASK | {"messages": messages}, return_token_ids=True).json()["prompt_token_ids"]
    special = set(markers.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert nasty in engine.tokenizer.decode(ids)


def test_a_prompt_that_does_not_fit_shows_both_numbers(server: LiveServer) -> None:
    response = server.chat(messages=[{"role": "user", "content": "1+" * 3000}])
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "2048" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_frees_everything(server: LiveServer, engine: Engine, stream: bool) -> None:
    leavers = [connect(server, **ENDLESS, stream=stream)]
    if stream:
        receive(leavers[0], b"delta")
    leavers += [connect(server, **ENDLESS, stream=stream) for _ in range(5)]  # four decode, two queue
    for leaver in leavers:
        leaver.close()
    # Its answer comes at all only because the slots are free again long before 2000 tokens.
    assert server.chat(**ASK).status_code == 200
    all_free(engine)


def test_a_full_queue_is_429(server: LiveServer, engine: Engine) -> None:
    waiting = [connect(server, **ENDLESS, n=4, stream=True)]
    receive(waiting[0], b"delta")  # only now: requests that arrive together are admitted in any order
    waiting.append(connect(server, **ENDLESS, n=4, stream=True))
    while engine.stats()["waiting"] < 4:
        assert server.client.get("/health/live").status_code == 200
    response = server.chat(**ASK)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    for client in waiting:
        client.close()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=SECONDS) as client:
        answer = client.chat.completions.create(model=engine.model_name, **ASK)  # it tries again on its own
    assert answer.choices[0].finish_reason in ("stop", "length")
    all_free(engine)


def test_a_failed_engine_says_so_and_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are told not to try again, and whoever watches the process to start it anew."""
    with Engine(config=EngineConfig(max_sequences=1)) as engine, live(engine) as server:

        def broken() -> None:
            raise AssertionError("planted fault")

        monkeypatch.setattr(engine._scheduler, "schedule", broken)
        for _ in range(2):
            response = server.chat(**ASK)
            assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
            assert "the engine has failed" in response.json()["error"]["message"]
            assert "planted fault" not in response.text
        health = server.client.get("/health/live")
        assert (health.status_code, "planted fault" in health.text) == (500, False)
        assert server.client.get("/health/ready").status_code == 503
