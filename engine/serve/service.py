"""What the routes share: the engine once it is loaded, the requests in flight, and whether new ones are taken."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from anyio import CapacityLimiter

from headrace.engine.serve.access import Access
from headrace.engine.serve.errors import ENGINE_FAILED, queue_full, unavailable
from headrace.engine.serve.history import History, Record, access_log
from headrace.engine.serve.incoming import MAX_BODY_BYTES, SMALL_BODY_BYTES, Bodies
from headrace.engine.serve.metrics import Metrics
from headrace.engine.serve.profiles import Profile
from headrace.engine.serve.stream import Events

if TYPE_CHECKING:
    from headrace.engine import Engine

ENCODERS = 4
"""Prompts that are encoded at once: more would only take turns at the interpreter, and the streams wait for theirs."""

LARGE_ENCODERS = 1
"""The same for large bodies."""

WRITERS = 2
"""JSON answers that are put together at once."""

STALL_SECONDS = 300.0
"""A step that takes longer is taken for one that never ends. Steps of a big model on a CPU are slow."""

MAX_RETRY_SECONDS = 60
PACE_WINDOW = 32


class Service:
    """State of one server, written on the event loop's thread.

    Exceptions: ``drain`` sets one flag in a signal handler, ``attach`` runs on the thread that loads the engine. Worker
    threads read ``ended``, the profile, the engine's name and ``retry_after``.
    """

    def __init__(
        self,
        engine: Engine | None,
        profile: Profile,
        access: Access,
        served_name: str | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.profile = profile
        self.access = access
        self.bodies = Bodies(max_body_bytes)
        self.created = int(time.time())
        self.fingerprint = f"headrace-{_version()}"
        self.draining = False
        self.history = History()
        self.writers = CapacityLimiter(WRITERS)
        self._encoders = CapacityLimiter(ENCODERS)
        self._large_encoders = CapacityLimiter(LARGE_ENCODERS)
        self._stall_seconds = stall_seconds
        self.ended = False  # what is in flight is being aborted, and nothing begins any more
        self._engine: Engine | None = None
        self._metrics: Metrics | None = None
        self._served_name = served_name
        self._encoding = 0
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
        """That the engine has failed for good, if it has, in words for anybody."""
        return ENGINE_FAILED if self._engine is not None and self._engine.fault is not None else None

    @property
    def hangs(self) -> str | None:
        """That a step does not end, if it does not."""
        if self._engine is None or self._engine.step_seconds < self._stall_seconds:
            return None
        return f"a step has not ended within {self._stall_seconds:g} seconds"

    @property
    def step_seconds(self) -> float:
        """How long the engine's step that is under way has been running; 0 where there is none."""
        return 0.0 if self._engine is None else self._engine.step_seconds

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
        return self._encoding + len(self._running)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Count a request until it is held, so that draining waits for it."""
        self._encoding += 1
        try:
            yield
        finally:
            self._encoding -= 1

    @contextmanager
    def hold(self, events: Events) -> Iterator[None]:
        """Own what is being generated while it is being answered: whatever happens, it does not go on alone."""
        self._running[id(events)] = events
        if self.ended:  # it was still being encoded
            events.abort()
        try:
            yield
        finally:
            del self._running[id(events)]
            events.close()
            self._ends.append(time.monotonic())

    def abort_all(self) -> None:
        """End every request in flight, also those whose prompt is still being encoded; each client is told."""
        self.ended = True
        for events in list(self._running.values()):
            events.abort()

    def answered(self, record: Record, path: str | None) -> None:
        """A request is over: for the log, the history and the metrics. ``path`` is its route's, None if it has none."""
        record.close()
        access_log.info("%s", record.line())
        if record.generates:
            self.history.add(record)
        if self._metrics is not None:
            self._metrics.answered(path or "other", record.status)

    def encoders(self, size: int) -> CapacityLimiter:
        """Where a body of ``size`` bytes waits for its turn to be encoded."""
        return self._encoders if size <= SMALL_BODY_BYTES else self._large_encoders


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # running from the sources
        return "source"
