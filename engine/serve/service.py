"""What the routes share: the engine once it is loaded, the requests in flight, and whether new ones are taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from headrace.engine.serve.access import Access
from headrace.engine.serve.errors import unavailable
from headrace.engine.serve.profiles import Profile

if TYPE_CHECKING:
    from headrace.engine import Engine, Stream

MAX_BODY_BYTES = 16 << 20


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
        self._engine = engine
        self._served_name = served_name
        self._in_flight = 0
        self._streams: dict[int, Stream] = {}

    def attach(self, engine: Engine) -> None:
        """The model is loaded: start taking requests."""
        self._engine = engine

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self.draining = True

    def admit(self) -> Engine:
        """The engine, for a new request; ApiError 503 while it is loading or when the server is draining."""
        if self.draining:
            raise unavailable("the server is shutting down", "draining")
        if self._engine is None:
            raise unavailable("the model is still loading", "starting")
        return self._engine

    @property
    def fault(self) -> str | None:
        """Why the engine has failed for good, if it has."""
        return self._engine.fault if self._engine is not None else None

    def name_of(self, engine: Engine) -> str:
        """The name that clients use for the engine's model."""
        return self._served_name or engine.model_name

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
    def hold(self, stream: Stream) -> Iterator[None]:
        """Own a stream while it is being answered: whatever happens, it does not go on alone."""
        self._streams[id(stream)] = stream
        try:
            yield
        finally:
            del self._streams[id(stream)]
            stream.abort()

    def abort_all(self) -> None:
        """End every request in flight; each client is told."""
        for stream in list(self._streams.values()):
            stream.abort()


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # running from the sources
        return "source"
