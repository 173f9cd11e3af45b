"""Running the application: the socket, the signals, and an orderly end."""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
import time
from copy import deepcopy
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from headrace.engine.serve.connection import MAX_CONNECTIONS, RESERVED_FILES, Connection
from headrace.engine.serve.service import Service

ABORT_GRACE_SECONDS = 5
"""How long a client has to take in the end of an aborted answer."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than clients and proxies keep theirs, so that they close first."""

FAULT_SECONDS = 5
"""How long a server whose engine has failed still says so, before it ends."""

BACKLOG = 2048
EXIT_SECONDS = 60
"""How long a step may have taken once the server has stopped, before the process ends without it."""


class DrainingServer(uvicorn.Server):
    """uvicorn that drains on SIGTERM and SIGINT: refuse new requests with 503, finish the others, exit with 0.

    After ``drain_seconds`` what is left is aborted. A second signal ends at once. An engine that has failed for good
    ends the server too, after FAULT_SECONDS in which every answer and ``/health/live`` say so.
    """

    def __init__(self, app: Starlette, *, drain_seconds: float = 60, log_level: str = "warning") -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level=log_level,
            log_config=log_config(log_level),
            access_log=False,  # ours says more, and nothing that a client may want kept
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
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

    @property
    def _unsent(self) -> bool:
        """Whether a client has yet to take in what was written for it."""
        connections: set[Any] = set(self.server_state.connections)
        return any(connection.transport.get_write_buffer_size() for connection in connections)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Ends the process, with status 1, if a step hangs by then: nothing else could.

        A step hangs if it has taken EXIT_SECONDS; after a second signal any step that is under way is one too many.
        """
        super().run(sockets)
        patience = 0 if self.force_exit else EXIT_SECONDS
        while 0 < (seconds := self.service.step_seconds) < patience:
            time.sleep(0.01)
        if seconds:
            why = "told twice to end" if self.force_exit else "giving up"
            print(f"headrace: a step has not ended within {seconds:.1f} seconds; {why}", file=sys.stderr, flush=True)
            os._exit(1)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self.service.draining:
            now = time.monotonic()
            self._deadline = min(self._deadline, now + self._drain_seconds)
            if now >= self._deadline:
                self.service.abort_all()
            self.should_exit |= not (self.service.in_flight or self._unsent) or now >= self._deadline
        elif self.service.fault is not None:
            now = time.monotonic()
            self._deadline = min(self._deadline, now + FAULT_SECONDS)
            self.should_exit |= now >= self._deadline
        return await super().on_tick(counter)


def log_config(level: str) -> dict[str, Any]:
    """uvicorn's logging and ours, all of it on stderr; the access log is one JSON object a line, from level info on."""
    config = deepcopy(uvicorn.config.LOGGING_CONFIG)
    del config["handlers"]["access"], config["loggers"]["uvicorn.access"]
    config["formatters"]["access"] = {"format": "%(message)s"}
    config["handlers"]["access"] = {**config["handlers"]["default"], "formatter": "access"}
    config["loggers"]["headrace"] = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    config["loggers"]["headrace.access"] = {"handlers": ["access"], "level": level.upper(), "propagate": False}
    return config


def allow_connections() -> None:
    """Raise this process's limit of open files, as far as it may, to what MAX_CONNECTIONS needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        highest = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


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
