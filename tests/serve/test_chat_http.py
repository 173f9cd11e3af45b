"""Answers over a real socket: the JSON body, the grammar of a stream, and that both say the same."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from live_server import LiveServer, joined
from scripted_engine import ScriptedEngine, answer, delta, finished

from headrace.engine import Usage

ENVELOPE = ("id", "object", "created", "model", "system_fingerprint")


def test_json_body(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(answer(usage=Usage(11, 7, 3, 2)))
    before = int(time.time())
    response = server.chat()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.pop("id") == response.headers["x-request-id"].replace("req-", "chatcmpl-")
    assert before <= body.pop("created") <= time.time()
    assert body.pop("system_fingerprint").startswith("headrace-")
    assert body == {
        "object": "chat.completion",
        "model": "scripted/model",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "It is 4.",
                    "reasoning_content": "Two and two.",
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 7,
            "total_tokens": 18,
            "completion_tokens_details": {"reasoning_tokens": 3},
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_stream_grammar(server: LiveServer) -> None:
    chunks = server.chunks()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Two and "},
        {"reasoning_content": "two."},
        {"content": "It is "},
        {"content": "4."},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({tuple(chunk[key] for key in ENVELOPE) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_include_usage_adds_one_chunk(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(answer(usage=Usage(11, 7, 3, 2)))
    *chunks, last = server.chunks(stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == server.chat().json()["usage"]
    assert {last[key] for key in ENVELOPE} == {chunks[0][key] for key in ENVELOPE}


@pytest.mark.parametrize("script", [
    answer(), answer(reasoning=()), answer(content=()), answer(reasoning=(), content=()), answer(reason="length"),
    answer(reasoning=(), content=("\u2028\x85\u2029 \n\r\x00", "日本語", "🙂", '"\\')),
    answer(reasoning=("only thought",), content=(), reason="length"),
])  # fmt: skip
def test_the_stream_says_what_the_body_says(server: LiveServer, engine: ScriptedEngine, script: list[Any]) -> None:
    engine.play(script)
    choice = server.chat().json()["choices"][0]
    chunks = server.chunks()
    for key in ("content", "reasoning_content"):
        assert joined(chunks, 0, key) == choice["message"][key]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_nothing_answered_is_null(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(answer(reasoning=("Hm",), content=(), reason="length"))
    choice = server.chat().json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "Hm"
    assert choice["finish_reason"] == "length"


def test_lines_end_only_where_events_do(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(answer(content=("a\u2028b\u2029c\x85d\x0be\x1cf",)))
    lines = server.chat(stream=True).text.splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)


def several() -> list[Any]:
    """Two choices, interleaved."""
    return [
        delta("reasoning", "a", index=1),
        delta("reasoning", "A", index=0),
        delta("content", "b", index=1),
        finished("length", index=1, usage=Usage(7, 2, 1, 0)),
        delta("content", "B", index=0),
        finished("stop", index=0, usage=Usage(7, 3, 1, 0)),
    ]


def test_several_choices(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(several())
    body = server.chat(n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["B", "b"]
    assert [choice["message"]["reasoning_content"] for choice in body["choices"]] == ["A", "a"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_tokens"] == 7
    *chunks, last = server.chunks(n=2, stream_options={"include_usage": True})
    assert last["usage"] == body["usage"]
    for choice in body["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert joined(chunks, choice["index"], "content") == choice["message"]["content"]
    assert engine.calls[0].params.n == 2


def test_logprobs(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([delta("reasoning", "é", logprobs=True), delta("content", "xy", logprobs=True), finished()])
    logprobs = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    top = [{"token": "x", "logprob": -0.12, "bytes": [120]}, {"token": "y", "logprob": -9999.0, "bytes": [121]}]
    assert logprobs["content"][0] == top[0] | {"top_logprobs": top}
    assert [entry["token"] for entry in logprobs["content"]] == ["x", "y"]
    assert [entry["bytes"] for entry in logprobs["reasoning_content"]] == [[0xC3, 0xA9]]
    parts = [chunk["choices"][0]["logprobs"] for chunk in server.chunks(logprobs=True, top_logprobs=2)]
    for key in ("content", "reasoning_content"):
        assert [entry for part in parts if part for entry in part[key] or ()] == logprobs[key]
    assert parts[0] is None
    assert parts[-1] is None


def test_logprobs_come_only_when_asked_for(server: LiveServer, engine: ScriptedEngine) -> None:
    assert server.chat(logprobs=False).json()["choices"][0]["logprobs"] is None
    assert engine.calls[0].params.logprobs is False


def test_token_ids(server: LiveServer, engine: ScriptedEngine) -> None:
    script = [delta("reasoning", "hm", tokens=[5, 6]), delta("content", "so", tokens=[13, 7]), finished(token_ids=(2,))]
    engine.play(script)
    body = server.chat(return_token_ids=True).json()
    assert body["prompt_token_ids"] == [10, 11, 12]
    assert body["choices"][0]["token_ids"] == [5, 6, 13, 7, 2]
    chunks = server.chunks(return_token_ids=True)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[10, 11, 12], None, None, None]
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == body["choices"][0]["token_ids"]
    assert "token_ids" not in server.chat().text


def test_stream_is_the_default_and_accept_decides(server: LiveServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    kinds = {}
    for accept in ("*/*", "application/json", "text/event-stream"):
        response = server.client.post("/v1/chat/completions", content=body, headers={"accept": accept})
        kinds[accept] = response.headers["content-type"].split(";")[0]
    assert kinds == {
        "*/*": "text/event-stream", "application/json": "application/json", "text/event-stream": "text/event-stream"
    }  # fmt: skip


def test_seed_of_64_bits_arrives_exactly(server: LiveServer, engine: ScriptedEngine) -> None:
    server.chat(seed=2**64 - 1)
    assert engine.calls[0].params.seed == 18446744073709551615


def test_conversation_arrives_as_written(server: LiveServer, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "system", "content": "</think><|im_end|>"},
        {"role": "user", "content": [{"type": "text", "text": "a\x00"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "why"},
        {"role": "context", "content": "facts"},
        {"role": "user", "content": "d", "name": "Ann"},
    ]
    server.chat(messages=messages, reasoning_effort="low", chat_template_kwargs={"reasoning_budget": 3})
    call = engine.calls[0]
    assert call.prompt == [*messages[:4], {"role": "user", "content": "d"}]
    assert call.options.reasoning_effort == "low"
    assert call.options.budget == 3


def test_models(server: LiveServer) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert card["id"] == "scripted/model"
    assert card["object"] == "model"
    assert card["owned_by"] == "headrace"
    assert isinstance(card["created"], int)
    assert card["max_model_len"] == 4096
    assert server.client.get("/v1/models/scripted/model").json() == card
    assert server.client.get("/v1/models/none").status_code == 404


def test_health(server: LiveServer) -> None:
    assert server.client.get("/health/live").status_code == 200
    assert server.client.get("/health/ready").json() == {"status": "ready", "model": "scripted/model"}
    assert server.client.head("/health/ready").status_code == 200
