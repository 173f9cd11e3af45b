"""A client that goes away, streaming or not, before or in the answer, frees what it held at once."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from live_server import SECONDS, LiveServer, connect, receive
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished


def reset(client: socket.socket) -> None:
    """Close with a reset instead of an orderly end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


WAITING = [HOLD, *answer()]
BEGUN = [delta("reasoning", "Hm"), HOLD, *answer()]


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [WAITING, BEGUN], ids=["waiting", "begun"])
def test_leaving_aborts(server: LiveServer, engine: ScriptedEngine, script: Any, stream: bool, leave: Any) -> None:
    engine.play(script)
    client = connect(server, stream=stream)
    engine.wait_for(lambda: engine.running == 1)
    leave(client)
    engine.wait_for(lambda: engine.running == 0)
    assert engine.streams[0].aborted.is_set()


def test_leaving_in_the_middle_of_a_stream_aborts(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(BEGUN)
    client = connect(server)
    receive(client, b"reasoning_content")
    client.close()
    engine.wait_for(lambda: engine.running == 0)


def test_leaving_aborts_every_choice_but_no_neighbour(server: LiveServer, engine: ScriptedEngine) -> None:
    two = [delta("content", "a"), HOLD, finished(index=0), finished(index=1)]
    engine.play(two, [HOLD, *answer()], answer())
    leaver = connect(server, n=2, stream=False)
    engine.wait_for(lambda: engine.running == 1)
    neighbour = connect(server, stream=False)
    engine.wait_for(lambda: engine.running == 2)
    leaver.close()
    engine.wait_for(lambda: engine.running == 1)
    engine.streams[1].release()
    receive(neighbour, b"It is 4.")
    neighbour.close()
    assert not engine.streams[1].aborted.is_set()
    engine.wait_for(lambda: engine.running == 0)


def test_leaving_before_the_body_is_complete_asks_nothing(server: LiveServer, engine: ScriptedEngine) -> None:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{")
    client.close()
    assert server.chat().status_code == 200
    assert len(engine.calls) == 1


def test_many_leave(server: LiveServer, engine: ScriptedEngine) -> None:
    engine.play(WAITING)
    clients = [connect(server, stream=i % 2 == 0) for i in range(40)]
    engine.wait_for(lambda: engine.running == 40)
    for client in clients:
        client.close()
    engine.wait_for(lambda: engine.running == 0)
