"""Clients and kernels that misbehave, on real sockets around the real engine. Afterwards everything is back."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from live_server import QUESTION, SECONDS, LiveServer, all_free, connect, live, receive
from scripted_engine import ScriptedEngine, delta, finished

from headrace.engine import Engine, EngineConfig
from headrace.engine.run.runner import Runner
from headrace.engine.serve import connection, incoming, service

ENDLESS: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "seed": 1}
THREADS = service.ENCODERS + service.LARGE_ENCODERS + service.WRITERS  # that a server may have for work of its own
LONG_PROMPT = [{"role": "user", "content": "1 + 1 = 2. " * 60}]  # several prefill chunks


def tasks_of(server: LiveServer) -> int:
    """Tasks on the server's event loop, but for the one that counts."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), server.loop).result(SECONDS)


def until(ready: Callable[[], bool]) -> None:
    """Wait for a condition that nobody announces."""
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.005)


@pytest.fixture
def untouched(real: LiveServer, real_engine: Engine) -> Iterator[LiveServer]:
    """The server; after the test pages, slots, tasks, threads, connections and requests are as they were."""
    assert real.chat(max_tokens=1).status_code == 200  # worker threads and our own connection exist from here on
    before = tasks_of(real), len(real.server_state.connections), threading.active_count()
    yield real
    all_free(real_engine)
    until(lambda: (tasks_of(real), len(real.server_state.connections)) == before[:2])
    until(lambda: threading.active_count() <= before[2] + THREADS)
    assert real.service.in_flight == 0
    assert not real.service._running
    assert real.chat(max_tokens=1).status_code == 200


def reset(client: socket.socket) -> None:
    """Close with a reset instead of an orderly end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


def half_close(client: socket.socket) -> None:
    """Say that nothing more will be sent. A client that still reads is told nothing more: it counts as gone."""
    client.shutdown(socket.SHUT_WR)


# --- clients that vanish --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize("stream", [False, True])
def test_vanishing_while_decoding_and_while_queued(
    untouched: LiveServer, real_engine: Engine, stream: bool, leave: Any
) -> None:
    clients = [connect(untouched, **ENDLESS, stream=stream) for _ in range(4)]
    until(lambda: real_engine.stats()["running"] == 4)
    clients += [connect(untouched, **ENDLESS, stream=stream) for _ in range(4)]
    until(lambda: real_engine.stats()["waiting"] == 4)
    for client in reversed(clients):
        leave(client)
    all_free(real_engine)
    for client in clients:
        client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_vanishing_in_the_middle_of_a_prompt(
    untouched: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The engine is held between two chunks of the prompt while the client leaves; no token is ever decided."""
    chunk_done, gone = threading.Event(), threading.Event()
    execute = Runner.execute
    decided: list[int] = []

    def held(runner: Runner, plan: Any) -> Any:
        result = execute(runner, plan)
        decided.extend(token for token in result.tokens.tolist() if token >= 0)
        if plan.chunks and not plan.chunks[0].last:
            chunk_done.set()
            assert gone.wait(SECONDS)
        return result

    monkeypatch.setattr(Runner, "execute", held)
    client = connect(untouched, messages=LONG_PROMPT, stream=stream)
    assert chunk_done.wait(SECONDS)
    client.close()
    until(lambda: untouched.service.in_flight == 0 or bool(real_engine._loop._mail))
    gone.set()
    all_free(real_engine)
    assert not decided


def test_vanishing_over_and_over(untouched: LiveServer, real_engine: Engine) -> None:
    for i in range(60):
        client = connect(untouched, **ENDLESS, stream=bool(i % 2), n=1 + i % 3)
        if i % 4 == 1:  # begun, or refused if those that left are not all noticed yet
            receive(client, b'{"')
        (reset if i % 5 else socket.socket.close)(client)
    all_free(real_engine)


def test_vanishing_from_several_prompts(untouched: LiveServer, real_engine: Engine) -> None:
    body = json.dumps({"prompt": ["1", "2", "3"], "stream": True, **ENDLESS}).encode()
    client = socket.create_connection(("127.0.0.1", untouched.port), timeout=SECONDS)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    receive(client, b"text_completion")
    assert real_engine.stats()["running"] == 3
    client.close()


def is_cut(client: socket.socket) -> bool:
    """Wait for the server's end of a connection on which it says nothing."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


# --- clients that do not go on --------------------------------------------------------------------------------------


def test_a_reader_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it in this process stays small, a neighbour is not held up, and in the end it is cut."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    text = "x" * 4096
    engine = ScriptedEngine([*[delta("content", text, tokens=[1]) for _ in range(4000)], finished()], [finished()])
    with live(engine) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": QUESTION, "stream": True}).encode()
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        engine.wait_for(lambda: engine.running == 1)
        until(lambda: any(c.flow.write_paused for c in server.server_state.connections))
        assert max(c.transport.get_write_buffer_size() for c in server.server_state.connections) < 3 * len(text)
        assert server.chat().status_code == 200
        engine.wait_for(lambda: engine.running == 0)
        assert engine.streams[0].aborted.is_set()
        until(lambda: server.service.in_flight == 0)
        client.close()


def test_a_slow_reader_that_goes_on_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.8)
    parts = [delta("content", "x" * 4096, tokens=[1]) for _ in range(300)]
    with live(ScriptedEngine([*parts, finished()])) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": QUESTION, "stream": False}).encode()
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        received = 0
        began = time.monotonic()
        while part := client.recv(16384):
            received += len(part)
            if time.monotonic() - began < 2.0:
                time.sleep(0.02)
        assert received > 300 * 4096
        client.close()


def test_a_thousand_connects_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    with live(ScriptedEngine()) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(400)]
        for client in idle[:100]:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")
        assert server.chat().status_code == 200
        idle += [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(600)]
        for client in idle:
            assert is_cut(client)
            client.close()
        until(lambda: len(server.server_state.connections) <= 1)
        assert server.chat().status_code == 200


def test_half_a_head_does_not_restart_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
    with live(ScriptedEngine()) as server:
        client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        began = time.monotonic()
        with pytest.raises(OSError):
            while True:
                client.sendall(b"x")
                time.sleep(0.05)
                assert time.monotonic() - began < SECONDS
        client.close()


def test_more_connections_than_allowed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    with live(ScriptedEngine()) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(3)]
        until(lambda: len(server.server_state.connections) == 3)
        response = httpx.get(server.url + "/health/live", timeout=SECONDS)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_connections")
        assert response.headers["x-request-id"].startswith("req-")
        assert int(response.headers["retry-after"]) >= 1
        held.pop().close()
        until(lambda: len(server.server_state.connections) == 2)
        assert server.client.get("/health/live").status_code == 200
        for client in held:
            client.close()


def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "BODY_SECONDS", 0.2)
    with live(ScriptedEngine()) as server:
        client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{")
        answer = receive(client, b"request_timeout")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
        client.close()
        assert server.chat().status_code == 200


def test_the_system_looks_for_peers_that_vanished_without_a_word(untouched: LiveServer) -> None:
    client = connect(untouched, **ENDLESS, stream=True)
    receive(client, b"delta")
    for conn in untouched.server_state.connections:
        accepted = conn.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in connection._KEEP_ALIVE.items():
            if hasattr(socket, name):
                assert accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    client.close()


@pytest.mark.parametrize("junk", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\r\n" * 10 + b"hello\r\n\r\n",
    b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"GET / HTTP/1.1\r\n\r\n",
    "GET /é HTTP/1.1\r\nhost: localhost\r\n\r\n".encode(),
])  # fmt: skip
def test_what_is_not_http(untouched: LiveServer, junk: bytes) -> None:
    client = socket.create_connection(("127.0.0.1", untouched.port), timeout=SECONDS)
    client.sendall(junk)
    answer = receive(client, b"}}")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") or b" 404 " in head.split(b"\r\n")[0]
    assert b"x-request-id: req-" in head.lower()
    assert list(json.loads(body)) == ["error"]
    client.close()


# --- the engine's faults --------------------------------------------------------------------------------------------


def fail_steps(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The next steps raise, as a kernel would."""
    execute = Runner.execute
    left = [count]

    def failing(runner: Runner, plan: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("planted: illegal memory access")
        return execute(runner, plan)

    monkeypatch.setattr(Runner, "execute", failing)


def test_a_failing_step_fails_its_requests_and_no_others(
    untouched: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = connect(untouched, **ENDLESS, stream=True)
    receive(begun, b"delta")
    fail_steps(monkeypatch, 1)
    tail = receive(begun, b'"error"')
    assert b"[DONE]" not in tail
    begun.close()
    fail_steps(monkeypatch, 1)
    response = untouched.chat(max_tokens=4)
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert response.json()["error"]["code"] == "generation_failed"
    assert "planted" not in response.text + tail.decode()
    assert untouched.chat(max_tokens=4).status_code == 200
    assert untouched.client.get("/health/live").status_code == 200


def test_a_model_whose_every_step_fails_is_live_but_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(config=EngineConfig(max_sequences=2, max_context=256)) as engine, live(engine) as server:
        fail_steps(monkeypatch, 10**9)
        assert server.chat().status_code == 500
        response = server.client.get("/health/ready")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_answering")
        assert server.client.get("/health/live").status_code == 200
        monkeypatch.undo()
        assert server.client.get("/health/ready").status_code == 200
        all_free(engine)


def test_out_of_pages_everybody_still_gets_the_answer_they_would_get_alone() -> None:
    """Eight answers in the pages of two: they are preempted and come back."""
    config = EngineConfig(max_sequences=8, max_context=512, num_pages=34)
    with Engine(config=config) as engine, live(engine) as server:
        fields = {"max_tokens": 120, "ignore_eos": True, "temperature": 1}
        alone = [server.chat(**fields, seed=i).json()["choices"] for i in range(8)]
        results: list[Any] = [None] * 8

        def ask(i: int) -> None:
            results[i] = httpx.post(
                server.url + "/v1/chat/completions",
                json={"messages": QUESTION, "stream": False, "seed": i} | fields,
                timeout=60,
            ).json()["choices"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == alone
        assert engine.stats()["preemptions"] > 0
        all_free(engine)


def test_a_prompt_that_no_number_of_pages_holds_is_refused_at_the_door() -> None:
    with Engine(config=EngineConfig(max_sequences=2, num_pages=8)) as engine, live(engine) as server:
        response = server.chat(messages=LONG_PROMPT)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert server.chat(max_tokens=2).status_code == 200
        all_free(engine)


def test_sigterm_under_load() -> None:
    """What was admitted finishes, what comes later is refused, and then the server is gone."""
    with Engine(config=EngineConfig(max_sequences=4, max_context=512)) as engine:
        threads_before = threading.active_count()
        with live(engine) as server:
            clients = [connect(server, stream=bool(i % 2), max_tokens=60, ignore_eos=True) for i in range(12)]
            until(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 12)
            server.handle_exit(signal.SIGTERM, None)
            refused = server.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            answers = [receive(client, b"[DONE]" if i % 2 else b'"usage"') for i, client in enumerate(clients)]
            assert all(b'"length"' in answer for answer in answers)
            assert server.stopped.wait(SECONDS)
            for client in clients:
                client.close()
        all_free(engine)
        until(lambda: threading.active_count() <= threads_before + THREADS)


def test_an_engine_that_failed_for_good_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.engine.serve import run

    monkeypatch.setattr(run, "FAULT_SECONDS", 0.3)
    engine = ScriptedEngine()
    with live(engine) as server:
        assert server.client.get("/health/live").status_code == 200
        engine.fault = "the device is lost"
        response = server.client.get("/health/live")
        assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
        assert server.stopped.wait(SECONDS)
