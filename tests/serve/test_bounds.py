"""Bodies made to cost much and clients made to hold much: what they can cost and hold has an end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
from live_server import QUESTION, SECONDS, LiveServer, all_free, connect, live, receive
from scripted_engine import HOLD, ScriptedEngine, delta, finished

from headrace.engine import Engine
from headrace.engine.serve import connection, fields, incoming, run
from headrace.engine.serve.errors import ApiError
from headrace.engine.serve.profiles import NIM
from headrace.engine.serve.prompts import detokenize, parse_completion
from headrace.engine.serve.protocol import parse_chat

PATH = "/v1/chat/completions"
CONTEXT = ScriptedEngine.max_context


def until(ready: Any) -> None:
    """Wait for a condition that nobody announces."""
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.005)


# --- lists in which everything is wrong -----------------------------------------------------------------------------


def chat(body: bytes) -> Any:
    return parse_chat(body, None, NIM, "m", CONTEXT)


def completion(body: bytes) -> Any:
    return parse_completion(body, None, NIM, "m", ScriptedEngine())  # type: ignore[arg-type]


def detokenized(body: bytes) -> Any:
    return detokenize(body, "m", ScriptedEngine())  # type: ignore[arg-type]


MANY_PARTS = [{"role": "user", "content": [{"type": "x"}] * 1000}] * 20
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (detokenized, {"tokens": [-1] * CONTEXT}, "tokens[0]"),
    (completion, {"prompt": [7] + [-1] * (CONTEXT - 2)}, "prompt[1]"),
    (completion, {"prompt": [[-1] * (CONTEXT - 1)] * 60}, "prompt[0][0]"),
    (completion, {"prompt": ["x"] + [1] * 60}, "prompt[1]"),
    (chat, {"messages": [{"role": 1, "content": 2}] * 4000}, "messages[0].role"),
    (chat, {"messages": MANY_PARTS}, "messages[0].content[0].type"),
    (chat, {"messages": QUESTION, "stop": [1] * 16}, "stop[0]"),
]


@pytest.mark.parametrize(("parse", "body", "param"), WRONG)
def test_the_first_wrong_item_ends_it(parse: Any, body: dict[str, Any], param: str, monkeypatch: Any) -> None:
    """pydantic makes an error of each item unless it is told not to, and a dict of each error."""
    counted: list[int] = []
    told = fields._field_error
    monkeypatch.setattr(fields, "_field_error", lambda error: counted.append(error.error_count()) or told(error))
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (422, param)
    assert counted[0] <= 4  # of one message


@pytest.mark.parametrize("item", [-1, "x", None])
def test_ids_that_cannot_fit_are_not_looked_at(real: LiveServer, real_engine: Engine, item: Any) -> None:
    context = real_engine.max_context
    response = real.client.post("/detokenize", json={"tokens": [item] * (context + 1)})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (422, "tokens")
    assert f"at most {context} items" in error["message"] and f"got {context + 1}" in error["message"]
    assert real.client.post("/detokenize", json={"tokens": [9] * context}).status_code == 200
    for prompt in ([1] + [item] * (context - 1), [[1], [1] + [item] * (context - 1)]):
        response = real.client.post("/v1/completions", json={"prompt": prompt})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "prompt")
        assert str(context) in error["message"]
    properties = real.client.get("/openapi.json").json()["components"]["schemas"]["DetokenizeRequest"]["properties"]
    assert properties["tokens"]["maxItems"] == context


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'"[,"', b'"\\\\"'])
def test_a_body_of_many_values_is_not_parsed(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = fields.MIN_VALUES
    monkeypatch.setattr(fields, "from_json", lambda *args, **kwargs: pytest.fail("parsed"))
    with pytest.raises(ApiError, match=f"more than {limit} values") as caught:
        fields.parse_object(b'{"x":[' + b",".join([value] * (limit + 1)) + b"]}", CONTEXT)
    assert (caught.value.status, caught.value.code) == (413, "too_many_values")


def test_as_many_values_as_the_context_may_need_are_parsed() -> None:
    body = json.dumps({"x": [1] * (fields.MIN_VALUES + 1000)}, separators=(",", ":")).encode()
    with pytest.raises(ApiError):
        fields.parse_object(body, fields.MIN_VALUES // 2)
    assert fields.parse_object(body, fields.MIN_VALUES)["x"][-1] == 1


@pytest.mark.parametrize("text", [",[{", '\\",', '"{\\', "\\\\,\n"])
def test_commas_and_brackets_of_texts_are_no_values(text: str) -> None:
    text *= fields.MIN_VALUES
    assert fields.parse_object(json.dumps({"a": [text, 1], "b": text}).encode(), CONTEXT) == {"a": [text, 1], "b": text}


def test_counting_takes_no_memory() -> None:
    body = b'{"a":"' + b"\\,," * (1 << 20)
    tracemalloc.start()
    try:
        assert not fields._has_more_values(body, fields.MIN_VALUES)
        assert tracemalloc.get_traced_memory()[1] < len(body) // 2
    finally:
        tracemalloc.stop()


def test_a_long_value_is_cut_before_it_is_written_out() -> None:
    """Of a value that a message shows no more is made than is shown."""
    written: list[int] = []

    class Told:
        def __str__(self) -> str:
            written.append(1)
            return "told"

    assert fields.shown([Told()] * 100_000) == json.dumps(["told"] * 9)[:57] + "..."
    assert len(written) < 20
    assert fields.shown("é" * 10**6) == '"' + "é" * 56 + "..."
    assert (fields.shown("x" * 58), fields.shown({"a": [1, None]})) == ('"' + "x" * 58 + '"', '{"a": [1, null]}')


# --- texts of options, and reasoning that is kept -------------------------------------------------------------------


def test_texts_of_options_and_kept_reasoning_count(
    real: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    template: Any = real_engine._template
    longest = real_engine.tokenizer.longest_token
    assert longest is not None
    limit = longest * real_engine.max_context
    turn = {"role": "assistant", "content": "4", "reasoning_content": "x" * (limit // 2)}
    asked = {"messages": [*QUESTION, turn] * 3 + QUESTION, "max_tokens": 2}
    assert "truncate_history_thinking" in template.arguments
    assert real.chat(**asked).status_code == 200
    monkeypatch.setattr(type(template), "render", lambda *args, **kwargs: pytest.fail("rendered"))
    response = real.chat(**asked, chat_template_kwargs={"truncate_history_thinking": False})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    monkeypatch.setattr(type(template), "arguments", frozenset({"persona"}))
    response = real.chat(chat_template_kwargs={"persona": ["x" * limit, {"y": "z"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")


# --- bodies and readers that are slow -------------------------------------------------------------------------------


def test_a_large_body_that_stops_coming_gives_up_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "LEAST_SECONDS", 0.4)
    size = 4 * incoming.LEAST_BYTES
    with live(ScriptedEngine()) as server:
        head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), size)
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(2)]
        for client in clients:
            client.sendall(head + b" " * incoming.LEAST_BYTES)
        until(lambda: server.service.bodies.held == 2 * incoming.LEAST_BYTES)
        for client in clients[:1]:  # this one goes on, in all for longer than LEAST_SECONDS
            for _ in range(3):
                time.sleep(0.2)
                client.sendall(b" " * incoming.LEAST_BYTES)
        answer = receive(clients[1], b"request_timeout")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"bytes in 0.4 seconds" in answer
        assert b"malformed_json" in receive(clients[0], b"code")
        until(lambda: server.service.bodies.held == 0)
        for client in clients:
            client.close()


@pytest.mark.parametrize(("rate", "whole"), [(1 << 10, True), (1 << 30, False)])
def test_a_reader_has_to_take_at_a_least_rate(rate: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(connection, "LEAST_RATE", rate)
    size = 12 << 20
    with live(ScriptedEngine([delta("content", "x" * size, tokens=[1]), finished()])) as server:
        client = connect(server, stream=False)
        received = 0
        try:
            while received < size:  # never a pause, and a good second for all of it
                part = client.recv(1 << 18)
                if not part:
                    break
                received += len(part)
                time.sleep(0.02)
        except OSError:
            pass
        assert (received >= size) == whole
        client.close()


# --- bytes behind a last request ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("early", [b"x", b"\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_bytes_behind_a_last_request_do_not_spoil_its_answer(
    server: LiveServer, engine: ScriptedEngine, version: bytes, early: bytes
) -> None:
    engine.play([delta("content", "It"), HOLD, delta("content", " is"), finished()])
    body = json.dumps({"messages": QUESTION, "stream": True}).encode()
    head = b"POST %b HTTP/%b\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    client.sendall(head % (PATH.encode(), version, len(body)) + body)
    answer = receive(client, b'"It"')
    client.sendall(early)
    time.sleep(0.05)
    client.sendall(early)
    time.sleep(0.05)
    engine.streams[0].release()
    while part := client.recv(65536):
        answer += part
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"[DONE]" in answer and b"malformed" not in answer
    client.close()


def test_a_client_that_leaves_after_its_last_request_is_noticed(real: LiveServer, real_engine: Engine) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 1900, "ignore_eos": True}).encode()
    steps = real_engine.stats()["steps"]
    client = socket.create_connection(("127.0.0.1", real.port), timeout=SECONDS)
    head = b"POST %b HTTP/1.0\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    client.sendall(head % (PATH.encode(), len(body)) + body + b"x")
    receive(client, b"data: ")
    client.sendall(b"x")
    client.close()
    all_free(real_engine)
    assert real_engine.stats()["steps"] - steps < 1900


def test_nothing_follows_an_answer_that_came_before_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused from its head alone; then the rest of its body is no HTTP."""
    engine = ScriptedEngine()
    with live(engine) as server:
        monkeypatch.setattr(engine, "stats", lambda: {"running": 64, "waiting": 64, "total_slots": 64, "steps": 0})
        client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        client.sendall(b"POST %b HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" % PATH.encode())
        answer = receive(client, b"queue_full")
        client.sendall(b"this is no chunk\r\n\r\n")
        try:
            while part := client.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        assert answer.count(b"HTTP/1.1 ") == 1
        client.close()


# --- the end of a process whose step hangs --------------------------------------------------------------------------

HANGS = """
import sys, threading
from types import SimpleNamespace
from headrace.engine.serve import run
import uvicorn
uvicorn.Server.run = lambda self, sockets=None: None
server = run.DrainingServer.__new__(run.DrainingServer)
server.force_exit = sys.argv[1] == "forced"
seconds = iter([float(s) for s in sys.argv[2:]])
class Service:
    step_seconds = property(lambda self: next(seconds))
server.service = Service()
server.run()
print("orderly", flush=True)
"""


@pytest.mark.parametrize(("how", "seconds", "status", "said"), [
    ("drained", [59.0, 59.9, 60.0], 1, "a step has not ended within 60.0 seconds; giving up"),
    ("drained", [61.5], 1, "61.5 seconds; giving up"),  # the drain counts: nobody waits sixty more
    ("drained", [0.5, 0.6, 0.0], 0, ""),
    ("forced", [0.5], 1, "0.5 seconds; told twice to end"),
    ("forced", [0.0], 0, ""),
])  # fmt: skip
def test_a_step_has_sixty_seconds_in_all(how: str, seconds: list[float], status: int, said: str) -> None:
    assert run.EXIT_SECONDS == 60
    argv = [sys.executable, "-c", HANGS, how, *map(str, seconds)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (ended.returncode, "orderly" in ended.stdout) == (status, status == 0), ended.stderr
    assert said in ended.stderr if said else not ended.stderr


FORGOTTEN = """
import threading, time
from headrace.engine import Engine, EngineConfig, SamplingParams, loop
from headrace.engine.run.runner import Runner
loop.STEP_SECONDS = 1.0
entered = threading.Event()
def hang(self, plan):
    entered.set()
    threading.Event().wait()
Runner.execute = hang
engine = Engine(config=EngineConfig(max_sequences=1, max_context=64, backend="reference"))
stream = engine.generate_stream([9], SamplingParams(max_tokens=4))
assert entered.wait(20)
loop.STEP_SECONDS = 0.2
try:
    engine.close()
except TimeoutError:
    loop.STEP_SECONDS = 600.0
    print("refused", flush=True)
"""


def test_an_engine_that_cannot_be_closed_does_not_hold_up_the_end_of_the_process() -> None:
    argv = [sys.executable, "-c", FORGOTTEN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (ended.returncode, ended.stdout) == (0, "refused\n"), ended.stderr
