"""Large bodies, many of them, long answers, and clients that send on: nobody else waits, and nothing is kept."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import threading
import time
import tracemalloc
from typing import Any

import httpx
import pytest
from live_server import QUESTION, SECONDS, LiveServer, all_free, connect, live, receive
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished

from headrace.engine import Engine
from headrace.engine.serve import connection, incoming
from headrace.engine.serve.bodies import dumped

PATH = "/v1/chat/completions"
LARGE = "x" * (2 * incoming.SMALL_BODY_BYTES)


def until(ready: Any) -> None:
    """Wait for a condition that nobody announces."""
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.005)


# --- bytes behind a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("early", [b"\r\n", b"POST /v1/chat", b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_bytes_behind_a_body_do_not_hide_that_the_client_leaves(
    real: LiveServer, real_engine: Engine, early: bytes, stream: bool
) -> None:
    steps = real_engine.stats()["steps"]
    client = connect(real, max_tokens=1900, ignore_eos=True, stream=stream)
    until(lambda: real_engine.stats()["running"] == 1)
    client.sendall(early)
    time.sleep(0.05)
    client.close()
    all_free(real_engine)
    assert real_engine.stats()["steps"] - steps < 1900


def test_bytes_in_the_same_piece_as_the_body_do_not_either(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([HOLD])
    body = json.dumps({"messages": QUESTION}).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(body))
    client.sendall(head + body + b"GET /health/live HT")
    engine.wait_for(lambda: engine.running == 1)
    client.close()
    engine.wait_for(lambda: engine.running == 0)


def test_the_next_request_may_come_early_and_empty_lines_mean_nothing(
    server: LiveServer, engine: ScriptedEngine
) -> None:
    engine.play([delta("content", "It"), HOLD, *answer()])
    client = connect(server, stream=True)
    receive(client, b'"It"')
    client.sendall(b"\r\n")
    time.sleep(0.02)
    client.sendall(b"\r\nGET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
    time.sleep(0.02)
    engine.streams[0].release()
    assert b"[DONE]" in receive(client, b'{"status":"live"}')
    client.close()


def test_what_comes_early_is_bounded(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([HOLD])
    client = connect(server, stream=True)
    engine.wait_for(lambda: engine.running == 1)
    with pytest.raises(OSError):
        for _ in range(1000):
            client.sendall(b"x" * connection.EARLY_BYTES)
            time.sleep(0.005)
    engine.wait_for(lambda: engine.running == 0)
    client.close()


# --- large bodies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PATH, "/tokenize"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_rendered(
    real: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(type(real_engine._template), "render", lambda *args, **kwargs: pytest.fail("rendered"))
    assert real_engine.tokenizer.longest_token is not None
    limit = real_engine.tokenizer.longest_token * real_engine.max_context
    text = "é</think> " * limit
    few = -(-len(text.encode()) // real_engine.tokenizer.longest_token)
    for content in (text, [{"type": "text", "text": text[:-1]}, {"type": "text", "text": " "}]):
        response = real.client.post(path, json={"messages": [{"role": "user", "content": content}]})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert f"at least {few} tokens" in error["message"]
        assert f"context {real_engine.max_context}" in error["message"]


def test_the_same_for_raw_prompts(real: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(real_engine.tokenizer), "encode_with_markers", lambda *args, **kwargs: pytest.fail("encoded")
    )
    for path in ("/v1/completions", "/tokenize"):
        response = real.client.post(path, json={"prompt": "</think>" * 20_000})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_earlier_reasoning_that_the_template_drops_does_not_count(real: LiveServer, real_engine: Engine) -> None:
    assert real_engine.tokenizer.longest_token is not None
    limit = real_engine.tokenizer.longest_token * real_engine.max_context
    thought = "1 + 1 = 2. " * (limit // 11)
    turns: list[dict[str, Any]] = []
    for _ in range(3):
        turns += [*QUESTION, {"role": "assistant", "reasoning_content": thought, "content": "4"}]
    assert real.chat(messages=turns + QUESTION, max_tokens=2).status_code == 200
    turns[1]["reasoning_content"] = "x" * (limit + 1)
    assert real.chat(messages=turns + QUESTION, max_tokens=2).status_code == 400


def test_small_requests_do_not_wait_for_large_ones(server: LiveServer, engine: ScriptedEngine) -> None:
    """One large body at a time is encoded, and it takes none of the small ones' turns."""
    release, at_once = threading.Event(), []

    def slow(prompt: Any) -> list[Any]:
        if len(prompt[0]["content"]) > 100:
            at_once.append(1)
            assert release.wait(SECONDS)
            at_once.pop()
        return answer()

    engine.play(slow)
    large = [connect(server, messages=[{"role": "user", "content": LARGE}], stream=False) for _ in range(6)]
    until(lambda: at_once)
    assert server.chat().status_code == 200
    assert len(at_once) == 1
    release.set()
    for client in large:
        receive(client, b"It is 4.")
        client.close()


def test_nothing_is_done_for_a_client_that_left_before_its_turn(server: LiveServer, engine: ScriptedEngine) -> None:
    release, entered = threading.Event(), threading.Event()

    def slow(prompt: Any) -> list[Any]:
        entered.set()
        assert release.wait(SECONDS)
        return answer()

    engine.play(slow, answer())
    message = [{"role": "user", "content": LARGE}]
    first = connect(server, messages=message, stream=False)
    assert entered.wait(SECONDS)
    leavers = [connect(server, messages=message) for _ in range(3)]
    until(lambda: server.service.in_flight == 4)
    for leaver in leavers:
        leaver.close()
    until(lambda: sum(c.cycle is not None and c.cycle.disconnected for c in server.server_state.connections) == 0)
    time.sleep(0.05)
    release.set()
    receive(first, b"It is 4.")
    until(lambda: server.service.in_flight == 0)
    assert len(engine.calls) == 1
    first.close()


def test_large_bodies_in_hand_are_bounded_and_small_ones_always_taken() -> None:
    limit = 4 * incoming.SMALL_BODY_BYTES
    with live(ScriptedEngine(), max_body_bytes=limit) as server:
        head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), limit)
        begun = []
        for _ in range(incoming.LARGE_BODIES):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
            client.sendall(head + b" " * (limit - 1))
            begun.append(client)
        until(lambda: server.service.bodies.held == incoming.LARGE_BODIES * (limit - 1))
        response = server.chat(user=LARGE)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_bodies")
        assert int(response.headers["retry-after"]) >= 1
        assert server.chat().status_code == 200
        begun.pop().close()
        until(lambda: server.service.bodies.held == (incoming.LARGE_BODIES - 1) * (limit - 1))
        assert server.chat(user=LARGE).status_code == 200
        for client in begun:
            client.close()
        until(lambda: server.service.bodies.held == 0)


def test_a_body_is_not_kept_while_it_is_answered(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play([delta("content", "It"), HOLD, *answer()])
    size = 1 << 20
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        clients = [connect(server, stream=True, user="x" * size) for _ in range(8)]
        for client in clients:
            receive(client, b'"It"')
        assert tracemalloc.get_traced_memory()[0] - before < 2 * size
        assert server.service.bodies.held == 0
    finally:
        tracemalloc.stop()
    for client in clients:
        client.close()
    engine.wait_for(lambda: engine.running == 0)


def test_a_full_queue_is_told_before_the_body_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    with live(engine) as server:
        monkeypatch.setattr(engine, "stats", lambda: {"running": 64, "waiting": 64, "total_slots": 64, "steps": 0})
        client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        client.sendall(b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000\r\n\r\n{" % PATH.encode())
        assert receive(client, b"queue_full").startswith(b"HTTP/1.1 429 ")
        client.close()


# --- long answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    {}, {"a": []}, {"a": {}, "b": None, "é": [1, 2.5, "\u2028\"", False]}, {"tokens": list(range(1000))},
    {"choices": [{"logprobs": {"content": [{"token": "é", "top": [{"x": i}]} for i in range(200)]}}] * 3, "n": 1},
    {"choices": [{"deep": {"deeper": {"deepest": {"list": list(range(99)), "d": {}}}}}]},
    {"mixed": [[1, [2]], {"a": 1}]},
])  # fmt: skip
def test_a_body_made_of_pieces_is_the_same_body(body: Any) -> None:
    assert dumped(body) == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize("path", ["chat", "tokenize"])
def test_a_long_answer_does_not_hold_up_the_event_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put together on another thread, and in pieces: a busy loop still goes round while that happens."""
    tokens = 20_000
    engine = ScriptedEngine([delta("content", "x" * tokens, logprobs=True), finished()])
    with live(engine) as server:
        loop_thread = asyncio.run_coroutine_threadsafe(_current_thread(), server.loop).result(SECONDS)
        largest, threads = [0], set()
        encode = json.JSONEncoder.encode

        def watched(encoder: json.JSONEncoder, value: Any) -> str:
            text = encode(encoder, value)
            if len(text) > 4000:
                threads.add(threading.current_thread())
                largest[0] = max(largest[0], len(text))
            return text

        from headrace.engine.serve import bodies

        encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
        monkeypatch.setattr(bodies, "_encode", lambda value: watched(encoder, value))
        if path == "chat":
            answered = server.chat(logprobs=True, top_logprobs=2).json()
            assert len(answered["choices"][0]["logprobs"]["content"]) == tokens
        else:
            asked = {"prompt": "é" * tokens, "return_token_strs": True}
            assert server.client.post("/tokenize", json=asked).json()["count"] == tokens
        assert loop_thread not in threads
        assert largest[0] < 50_000  # of more than a million


async def _current_thread() -> threading.Thread:
    return threading.current_thread()


# --- connections, and the end ---------------------------------------------------------------------------------------


def test_no_more_connections_than_there_are_files_for(monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(connection, "RESERVED_FILES", files - 3)
    with live(ScriptedEngine()) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(3)]
        until(lambda: len(server.server_state.connections) == 3)
        response = httpx.get(server.url + "/health/live", timeout=SECONDS)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_connections")
        assert "more than 3 " in response.json()["error"]["message"]
        for client in held:
            client.close()


def test_what_is_still_being_encoded_when_the_drain_ends_does_not_begin() -> None:
    release, entered = threading.Event(), threading.Event()

    def slow(prompt: Any) -> list[Any]:
        entered.set()
        assert release.wait(SECONDS)
        return [HOLD]

    engine = ScriptedEngine(slow)
    with live(engine, drain_seconds=0.1) as server:
        client = connect(server, stream=False)
        assert entered.wait(SECONDS)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.service.ended)
        release.set()
        assert b'"aborted"' in receive(client, b'"code"')
        client.close()
        engine.wait_for(lambda: engine.running == 0)


def test_a_slow_reader_of_a_finished_answer_has_the_time_of_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.engine.serve import run

    monkeypatch.setattr(run, "ABORT_GRACE_SECONDS", 0)
    text = "x" * 8_000_000
    with live(ScriptedEngine([delta("content", text, tokens=[1]), finished()])) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": QUESTION, "stream": False}).encode()
        client.sendall(
            b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (PATH.encode(), len(body), body)
        )
        received = len(client.recv(1024))
        until(lambda: server.service.in_flight == 0)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.5)
        while part := client.recv(1 << 20):
            received += len(part)
        assert received > len(text)
        client.close()
