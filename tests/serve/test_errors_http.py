"""Every way to be refused or to fail, over a real socket; the server and the other requests live on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from live_server import QUESTION, LiveServer, live
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished

from headrace.engine import ContextExceeded, EngineClosed, QueueFull, RequestError

PATH = "/v1/chat/completions"


def check(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, in the one shape all errors have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req-")
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    assert body["error"]["type"]
    return body["error"]


def post(content: bytes) -> Callable[[LiveServer], httpx.Response]:
    return lambda server: server.client.post(PATH, content=content)


TABLE = {
    "not JSON": (400, None, post(b"{")),
    "empty": (400, None, post(b"")),
    "not an object": (400, None, post(b"[]")),
    "wrong UTF-8": (400, None, post(b'{"messages": "\xff"}')),
    "lone surrogate": (400, None, post(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')),
    "NaN": (400, None, post(b'{"temperature": NaN}')),
    "Infinity": (400, None, post(b'{"temperature": Infinity}')),
    "much nesting": (400, None, post(b"[" * 200_000)),
    "a megabyte of nesting": (413, None, post(b"[" * 1_000_000)),
    "compressed": (400, None, post(b"\x1f\x8b\x08\x00")),
    "no messages": (422, "messages", post(b"{}")),
    "wrong type": (422, "temperature", post(b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}')),
    "out of range": (422, "top_p", lambda server: server.chat(top_p=2)),
    "overflow": (422, "top_p", post(json.dumps({"messages": QUESTION}).encode()[:-1] + b', "top_p": 1e999}')),
    "not implemented": (422, "tools", lambda server: server.chat(tools=[{}])),
    "unknown model": (404, "model", lambda server: server.chat(model="gpt-4")),
    "unknown path": (404, None, lambda server: server.client.post("/v1/chat/completion")),
    "trailing slash": (404, None, lambda server: server.client.post(PATH + "/")),
    "wrong method": (405, None, lambda server: server.client.get(PATH)),
    "delete": (405, None, lambda server: server.client.delete("/v1/models")),
}


@pytest.mark.parametrize("name", TABLE)
def test_refusals(server: LiveServer, engine: ScriptedEngine, name: str) -> None:
    status, param, ask = TABLE[name]
    assert check(ask(server), status)["param"] == param
    assert not engine.calls
    assert server.chat().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "param", "headers"), [
    (ContextExceeded(5000, 4096), 400, "messages", {}),
    (RequestError("top_p is odd", param="top_p"), 422, "top_p", {}),
    (QueueFull(3, 3, retry_after=2.2), 429, None, {"retry-after": "3"}),
    (EngineClosed("the engine is draining"), 503, None, {"retry-after": "2"}),
    (RuntimeError("a bug with a secret"), 500, None, {"x-should-retry": "false"}),
])  # fmt: skip
def test_what_the_engine_refuses(
    server: LiveServer, engine: ScriptedEngine, stream: bool, error: Exception, status: int, param: str | None,
    headers: dict[str, str],
) -> None:  # fmt: skip
    engine.play(error)
    response = server.chat(stream=stream)
    assert check(response, status)["param"] == param
    assert response.headers.items() >= headers.items()
    assert "secret" not in response.text
    engine.play()
    assert server.chat(stream=stream).status_code == 200


def test_a_prompt_that_cannot_fit_shows_both_numbers(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(ContextExceeded(5000, 4096))
    error = check(server.chat(), 400)
    assert error["code"] == "context_length_exceeded"
    assert "5000" in error["message"]
    assert "4096" in error["message"]


@pytest.mark.parametrize("script", [
    [finished("error", error="raised: a secret", failure="logits")],
    [delta("reasoning", "Hm"), finished("error", error="raised: a secret", failure="logits")],
])  # fmt: skip
def test_a_failure_in_a_json_answer(server: LiveServer, engine: ScriptedEngine, script: list[Any]) -> None:
    engine.play(script)
    response = server.chat()
    assert check(response, 500)["message"] == "the model's logits are not finite"
    assert response.headers["x-should-retry"] == "false"


def test_a_failure_before_the_first_event_is_an_http_error(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([finished("error", error="raised: a secret", failure="logits")])
    assert check(server.chat(stream=True), 500)["code"] == "generation_failed"


@pytest.mark.parametrize(("end", "code"), [
    (finished("error", error="raised: a secret", failure="logits"), "generation_failed"),
    (finished("error", error="raised: a secret", failure="neighbours"), "step_failed"),
    (finished("abort"), "aborted"),
])  # fmt: skip
def test_a_failure_in_a_stream_is_its_last_event(
    server: LiveServer, engine: ScriptedEngine, end: Any, code: str
) -> None:
    engine.play([delta("content", "It is"), end], answer())
    response = server.chat(stream=True)
    assert response.status_code == 200
    *events, last, rest = response.text.split("\n\n")
    error = json.loads(last.removeprefix("data: "))
    assert list(error) == ["error"]
    assert error["error"]["code"] == code
    assert rest == ""
    assert len(events) == 2
    assert "[DONE]" not in response.text
    assert server.chunks()


def test_one_failing_choice_ends_the_others(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([delta("content", "a"), finished("error", index=1, error="no"), HOLD, finished(index=0)])
    check(server.chat(n=2), 500)
    engine.wait_for(lambda: engine.running == 0)


def test_bodies_are_bounded() -> None:
    engine = ScriptedEngine()
    with live(engine, max_body_bytes=10_000) as server:
        fits = server.chat(user="x" * 9_000)
        assert fits.status_code == 200
        for size in (10_000, 30_000, 5_000_000):
            error = check(server.chat(user="x" * size), 413)
            assert "10000" in error["message"]
        chunked = server.client.post(PATH, content=(b" " * 1000 for _ in range(30)))
        check(chunked, 413)
        assert len(engine.calls) == 1
        assert server.chat().status_code == 200


def test_a_bug_in_a_stream_ends_it_with_an_error(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([delta("content", "fine"), "not an event"])  # type: ignore[list-item]
    response = server.chat(stream=True)
    assert '"internal_error"' in response.text
    assert "[DONE]" not in response.text
    assert server.client.get("/health/ready").status_code == 200


def test_a_refusal_before_the_body_is_read_still_arrives() -> None:
    with live(ScriptedEngine(), keys=["k"]) as server:
        assert check(server.chat(user="x" * 5_000_000), 401)["code"] == "invalid_api_key"
        check(server.client.post("/nowhere", content=b" " * 5_000_000, headers={"authorization": "Bearer k"}), 404)
