"""Running the application: the socket, the signals, and an orderly end."""

from __future__ import annotations

import socket
import threading
import time
from copy import deepcopy
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from headrace.engine.serve.service import Service

ABORT_GRACE_SECONDS = 5
"""How long a client has to take in the end of an aborted answer."""

BACKLOG = 2048


class DrainingServer(uvicorn.Server):
    """uvicorn that drains on SIGTERM and SIGINT: refuse new requests with 503, finish the others, exit with 0.

    After ``drain_seconds`` what is left is aborted. A second signal ends at once.
    """

    def __init__(self, app: Starlette, *, drain_seconds: float = 60, log_level: str = "warning") -> None:
        config = uvicorn.Config(
            app,
            log_level=log_level,
            log_config=log_config(log_level),
            server_header=False,
            timeout_graceful_shutdown=ABORT_GRACE_SECONDS,
        )
        super().__init__(config)
        self.service: Service = app.state.service
        self._drain_seconds = drain_seconds
        self._deadline = float("inf")
        self.up = threading.Event()  # listening, and signals are handled

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        await super().startup(sockets)
        self.up.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler: it only sets flags, the next tick acts on them."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self.service.draining:
            now = time.monotonic()
            self._deadline = min(self._deadline, now + self._drain_seconds)
            if now >= self._deadline:
                self.service.abort_all()
            self.should_exit |= not self.service.in_flight or now >= self._deadline
        return await super().on_tick(counter)


def log_config(level: str) -> dict[str, Any]:
    """uvicorn's logging and ours, all of it on stderr."""
    config = deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = config["handlers"]["default"]["stream"]
    config["loggers"]["headrace"] = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    return config


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # With the protocol named (socket.create_server leaves it 0) asyncio turns Nagle's algorithm off: without that
    # the second write of every answer waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
