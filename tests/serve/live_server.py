"""A real server on a loopback socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from headrace.engine.serve.app import create_app
from headrace.engine.serve.run import DrainingServer, listen, url_of

SECONDS = 20
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


class LiveServer(DrainingServer):
    """Says when it has stopped, and knows how to ask itself."""

    def __init__(self, app: Any, listener: socket.socket, drain_seconds: float) -> None:
        super().__init__(app, drain_seconds=drain_seconds, log_level="critical")
        self.listener = listener
        self.port = listener.getsockname()[1]
        self.url = url_of(listener)
        self.stopped = threading.Event()
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.stopped.set()

    def chat(self, **fields: Any) -> httpx.Response:
        """A request for JSON, unless the fields say otherwise."""
        return self.client.post("/v1/chat/completions", json={"messages": QUESTION, "stream": False} | fields)

    def chunks(self, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, whose grammar is checked."""
        response = self.chat(**{"stream": True} | fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        *events, done, rest = response.text.split("\n\n")
        assert done == "data: [DONE]"
        assert rest == ""
        assert all(event.startswith("data: {") and "\n" not in event for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def live(engine: Any, *, drain_seconds: float = SECONDS, **options: Any) -> Iterator[LiveServer]:
    """Serve an engine until the block ends."""
    listener = listen("127.0.0.1", 0)
    server = LiveServer(create_app(engine, **options), listener, drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert server.up.wait(SECONDS)
        with server.client:
            yield server
    finally:
        server.service.abort_all()
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def all_free(engine: Any) -> None:
    """Wait until nothing runs; then every page and slot must be back."""
    deadline = time.monotonic() + SECONDS
    while (stats := engine.stats())["running"] or stats["waiting"] or engine._loop._live:
        assert time.monotonic() < deadline, f"still busy: {stats}"
        time.sleep(0.005)
    engine._scheduler.check()
    assert stats["free_slots"] == stats["total_slots"]
    assert stats["free_pages"] == stats["total_pages"]
    assert not engine._loop._masks


def joined(chunks: list[dict[str, Any]], index: int, key: str) -> str | None:
    """The concatenated deltas of one choice."""
    parts = [
        choice["delta"].get(key) or "" for chunk in chunks for choice in chunk["choices"] if choice["index"] == index
    ]
    return "".join(parts) or None


def connect(server: LiveServer, key: str = "", **fields: Any) -> socket.socket:
    """A request on a raw socket, sent in full."""
    body = json.dumps({"messages": QUESTION} | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    head += f"authorization: Bearer {key}\r\n\r\n" if key else "\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    client.sendall(head.encode() + body)
    return client


def receive(client: socket.socket, needle: bytes) -> bytes:
    """What has come once it holds the needle."""
    received = b""
    while needle not in received:
        part = client.recv(65536)
        assert part, f"the server closed after {received!r}"
        received += part
    return received
