"""Starting, draining and stopping: nobody waits in vain and nobody is cut without being told."""

from __future__ import annotations

import signal
import threading

import httpx
from live_server import SECONDS, LiveServer, live
from scripted_engine import HOLD, ScriptedEngine, answer, delta


def unavailable(response: httpx.Response, code: str) -> None:
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == code


def test_while_the_model_loads_the_server_says_so() -> None:
    with live(None) as server:
        for path in ("/health/ready", "/v1/models", "/v1/models/x"):
            unavailable(server.client.get(path), "starting")
        unavailable(server.chat(), "starting")
        assert server.client.get("/health/live").status_code == 200
        server.service.attach(ScriptedEngine())
        assert server.client.get("/health/ready").status_code == 200
        assert server.chat().status_code == 200


def begin(
    server: LiveServer, engine: ScriptedEngine, **fields: object
) -> tuple[threading.Thread, list[httpx.Response]]:
    """A request on another thread, which the engine has begun when this returns."""
    responses: list[httpx.Response] = []

    def ask() -> None:
        response = httpx.post(
            server.url + "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}]} | fields,
            timeout=SECONDS,
        )
        responses.append(response)

    thread = threading.Thread(target=ask)
    thread.start()
    engine.wait_for(lambda: engine.running == 1)
    return thread, responses


def test_draining_refuses_new_requests_and_finishes_the_others() -> None:
    engine = ScriptedEngine([delta("content", "It "), HOLD, *answer(reasoning=())])
    with live(engine) as server:
        thread, responses = begin(server, engine)
        server.handle_exit(signal.SIGTERM, None)
        unavailable(server.chat(), "draining")
        unavailable(server.client.get("/health/ready"), "draining")
        assert server.client.get("/health/live").status_code == 200
        assert not server.should_exit
        assert not responses
        engine.streams[0].release()
        thread.join(SECONDS)
        assert responses[0].text.endswith("data: [DONE]\n\n")
        assert server.stopped.wait(SECONDS)
        assert not server.force_exit


def test_what_does_not_finish_in_time_is_told() -> None:
    engine = ScriptedEngine([delta("content", "It "), HOLD])
    with live(engine, drain_seconds=0) as server:
        thread, responses = begin(server, engine)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(SECONDS)
        assert '"aborted"' in responses[0].text
        assert "[DONE]" not in responses[0].text
        assert engine.running == 0


def test_what_does_not_finish_in_time_is_told_without_a_stream_too() -> None:
    engine = ScriptedEngine([HOLD])
    with live(engine, drain_seconds=0) as server:
        thread, responses = begin(server, engine, stream=False)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(SECONDS)
        unavailable(responses[0], "aborted")


def test_a_second_signal_ends_at_once() -> None:
    engine = ScriptedEngine([HOLD])
    with live(engine) as server:
        begin(server, engine)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        assert server.should_exit
        assert server.force_exit


def test_an_idle_server_ends_when_told() -> None:
    with live(ScriptedEngine()) as server:
        server.handle_exit(signal.SIGTERM, None)
        assert server.stopped.wait(SECONDS)
