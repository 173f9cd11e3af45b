"""What the routes share: the engine once it is loaded, the requests in flight, and whether new ones are taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from starlette.requests import Request

from headrace.engine.serve.access import Access
from headrace.engine.serve.errors import ApiError, queue_full, unavailable
from headrace.engine.serve.history import History
from headrace.engine.serve.metrics import Metrics
from headrace.engine.serve.profiles import Profile
from headrace.engine.serve.stream import Events

if TYPE_CHECKING:
    from headrace.engine import Engine

MAX_BODY_BYTES = 16 << 20
BODY_SECONDS = 60.0
"""How long a client has to send a body."""

DISCARD_FACTOR = 4
"""A body over the limit is read and dropped up to this many times the limit, so that the client sees the answer."""

ENCODERS = 4
"""Prompts that are encoded at once: more would only take turns at the interpreter, and the streams wait for theirs."""

MAX_RETRY_SECONDS = 60
PACE_WINDOW = 32


class Service:
    """State of one server. All of it is read and written on the event loop's thread, but for ``drain``'s one flag."""

    def __init__(
        self,
        engine: Engine | None,
        profile: Profile,
        access: Access,
        served_name: str | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.profile = profile
        self.access = access
        self.max_body_bytes = max_body_bytes
        self.created = int(time.time())
        self.fingerprint = f"headrace-{_version()}"
        self.draining = False
        self.history = History()
        self.encoders = CapacityLimiter(ENCODERS)
        self._engine: Engine | None = None
        self._metrics: Metrics | None = None
        self._served_name = served_name
        self._in_flight = 0
        self._running: dict[int, Events] = {}
        self._ends: deque[float] = deque(maxlen=PACE_WINDOW)  # when the last answers ended
        if engine is not None:
            self.attach(engine)

    def attach(self, engine: Engine) -> None:
        """The model is loaded: start taking requests."""
        self._metrics = Metrics(engine, self.name_of(engine))
        self._engine = engine

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self.draining = True

    def admit(self) -> Engine:
        """The engine, for a new request; ApiError 503 while it is loading or when the server is draining."""
        if self.draining:
            raise unavailable("the server is shutting down", "draining")
        return self.engine

    def admit_generation(self) -> Engine:
        """The same for a request that generates; ApiError 429 at once, before any work, if the queue is full."""
        engine = self.admit()
        stats, limit = engine.stats(), engine.config.max_waiting
        if stats["running"] + stats["waiting"] >= stats["total_slots"] + limit:
            message = f"{stats['waiting']} sequences are waiting, the limit (max_waiting) is {limit}"
            raise queue_full(message, self.retry_after())
        return engine

    @property
    def engine(self) -> Engine:
        """The engine; ApiError 503 while it is loading."""
        if self._engine is None:
            raise unavailable("the model is still loading", "starting")
        return self._engine

    @property
    def metrics(self) -> Metrics:
        """The metrics of the engine; ApiError 503 while it is loading."""
        if self._metrics is None:
            raise unavailable("the model is still loading", "starting")
        return self._metrics

    @property
    def loaded(self) -> bool:
        """Whether there is an engine."""
        return self._engine is not None

    @property
    def fault(self) -> str | None:
        """Why the engine has failed for good, if it has."""
        return self._engine.fault if self._engine is not None else None

    def name_of(self, engine: Engine) -> str:
        """The name that clients use for the engine's model."""
        return self._served_name or engine.model_name

    def retry_after(self) -> float:
        """Seconds in which what waits now will have begun, at the pace of the last answers; 1 if there is no pace."""
        waiting = self._engine.stats()["waiting"] if self._engine is not None else 0
        if len(self._ends) < 2:
            return 1
        seconds_per_answer = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(max(1, waiting * seconds_per_answer), MAX_RETRY_SECONDS)

    @property
    def in_flight(self) -> int:
        """Requests that have been accepted and not been answered in full."""
        return self._in_flight

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it is being answered, so that draining waits for it."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @contextmanager
    def hold(self, events: Events) -> Iterator[None]:
        """Own what is being generated while it is being answered: whatever happens, it does not go on alone."""
        self._running[id(events)] = events
        try:
            yield
        finally:
            del self._running[id(events)]
            events.close()
            self._ends.append(time.monotonic())

    def abort_all(self) -> None:
        """End every request in flight; each client is told."""
        for events in list(self._running.values()):
            events.abort()


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises ApiError: 413 if it has more than ``limit`` bytes, 408 if it takes too long."""
    too_large = ApiError(
        413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"connection": "close"}
    )
    if int(request.headers.get("content-length", "0")) > limit * DISCARD_FACTOR:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > limit * DISCARD_FACTOR:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {BODY_SECONDS:g} seconds"
        raise ApiError(408, message, code="request_timeout", headers={"connection": "close"}) from None
    if size > limit:
        raise too_large
    return b"".join(chunks)


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # running from the sources
        return "source"
