"""One connection: uvicorn's HTTP/1.1, with an end to every kind of client that does not go on.

- no request, or half of one's head: closed after HEAD_SECONDS;
- a reader that takes nothing: what waits for it in this process is at most one event beyond the kernel's own buffer
  (tokens pile up in the engine's inbox, are put together, and are bounded by max_tokens), and one that in STALL_SECONDS
  takes neither all of it nor LEAST_RATE is cut, which frees what its request held;
- a peer that vanished without a word: TCP keep-alive and TCP_USER_TIMEOUT find out;
- one that sends on while it is being answered: read all the same, or its leaving would not be seen; at most EARLY_BYTES
  are kept for after the answer, more cuts the connection; what cannot be a request any more (``Connection: close``) is
  dropped;
- more connections than MAX_CONNECTIONS, or than there are open files for: 503 at once.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.engine.serve.access import SAFE_HEADERS
from headrace.engine.serve.errors import ApiError, unavailable
from headrace.engine.serve.history import Record, new_id
from headrace.engine.serve.service import Service

HEAD_SECONDS = 30.0
STALL_SECONDS = 60.0
LEAST_RATE = 1 << 10
"""Bytes a second, over STALL_SECONDS, that a reader has to take of what waits for it."""

EARLY_BYTES = 64 << 10
MAX_CONNECTIONS = 4096
RESERVED_FILES = 256
"""Open files besides connections: weights, libraries, logs."""

SEND_CHUNK = "headrace.send_chunk"
"""An extension of the ASGI scope, for HTTP/1.1: ``Connection.send_chunk``."""

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
        limit = connection_limit()
        if len(self.connections) > limit:
            self._refuse(unavailable(f"more than {limit} connections are open", "too_many_connections"))
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was cut."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request, or what comes before an answer has ended."""
        if self.conn.their_state in (h11.MUST_CLOSE, h11.CLOSED):  # said to be its last request: no error of it
            return
        if self.conn.their_state is not h11.SEND_BODY and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # empty lines before a request mean nothing (RFC 9112, 2.2)
            if not data:
                return
        super().data_received(data)
        if self._answering and not self.cycle.more_body:
            if len(self.conn.trailing_data[0]) > EARLY_BYTES:
                self.transport.abort()
                return
            self.flow.resume_reading()  # uvicorn stops here until the answer has ended, and sees nobody leave
        self._watch_head()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def handle_events(self) -> None:
        """Begin the requests whose heads are there."""
        super().handle_events()
        if self.cycle is not None and self.conn.their_http_version == b"1.1":
            scope: Any = self.scope  # to whose type an extension is a dict
            scope.setdefault("extensions", {})[SEND_CHUNK] = self.send_chunk

    async def send_chunk(self, data: bytes) -> None:
        """More of the body of the answer that runs, whose head has been sent without a length. ``data`` is not empty.

        What a message to ASGI's ``send`` would do, past the middleware, to which a body is no matter, and past h11,
        whose state a chunk does not change: there is one for every token.
        """
        cycle = self.cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if not cycle.disconnected:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _watch_head(self) -> None:
        """Run the clock while a request's head is awaited, not restarted by every byte of it."""
        begun = self._answering
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
        if before - left < STALL_SECONDS * LEAST_RATE:
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
        """Answer what never becomes a request of the application, and log it as one."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun: nothing may follow it
            self.transport.abort()
            return
        app: Any = self.config.app
        service: Service = app.state.service
        record = Record(
            new_id(), "", "", "", self.client[0] if self.client else None, status=error.status, error=error.code
        )
        body = json.dumps(error.body()).encode()
        headers = {
            **SAFE_HEADERS,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": record.id,
            **error.headers,
        }
        lines = [f"HTTP/1.1 {error.status} ", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()
        service.answered(record, None)


def connection_limit() -> int:
    """How many connections may be open: MAX_CONNECTIONS, if this process may have so many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, files - RESERVED_FILES))


def _keep_alive(connection: Any) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
