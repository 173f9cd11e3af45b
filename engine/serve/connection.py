"""One connection: uvicorn's HTTP/1.1, with an end to every kind of client that does not go on.

- no request, or half of one's head: closed after HEAD_SECONDS;
- a reader that takes nothing: what waits for it in this process is at most one event beyond the kernel's own buffer
  (tokens pile up in the engine's inbox, are put together, and are bounded by max_tokens), and after STALL_SECONDS
  without a byte taken the connection is cut, which frees what its request held;
- a peer that vanished without a word: TCP keep-alive and TCP_USER_TIMEOUT find out;
- more connections than MAX_CONNECTIONS: 503 at once.
"""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.engine.serve.errors import ApiError, unavailable

HEAD_SECONDS = 30.0
STALL_SECONDS = 60.0
MAX_CONNECTIONS = 4096

_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""Seconds, seconds, a count, milliseconds; where the system knows them."""


class Connection(H11Protocol):
    """See the module."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        _keep_alive(transport.get_extra_info("socket"))
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(unavailable(f"more than {MAX_CONNECTIONS} connections are open", "too_many_connections"))
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was cut."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Run the clock while a request's head is awaited, not restarted by every byte of it."""
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not begun and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """The kernel takes no more for this client."""
        super().pause_writing()
        self._watch_stall(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It takes more again."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch_stall(self, left: int) -> None:
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._check_stall, left)

    def _check_stall(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._watch_stall(left)

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the same error body as everything else."""
        self._refuse(ApiError(400, msg, code="malformed_http"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": f"req-{uuid.uuid4().hex}",
            **error.headers,
        }
        lines = [f"HTTP/1.1 {error.status} ", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()


def _keep_alive(connection: Any) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
