"""Bodies of requests on their way in: how large, how slow, and how many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from headrace.engine.serve.errors import ApiError, unavailable

MAX_BODY_BYTES = 16 << 20
BODY_SECONDS = 60.0
"""How long a client has to send a body."""

LEAST_BYTES, LEAST_SECONDS = 320 << 10, 5.0
"""More than SMALL_BODY_BYTES have to come on at this rate, or a few that do not go on would keep all others out."""

DISCARD_FACTOR = 4
"""A body that is refused is read and dropped up to this many times the limit, so that the client sees the answer."""

SMALL_BODY_BYTES = 64 << 10
"""Bodies up to this size count for nothing: no number of larger ones keeps them out."""

LARGE_BODIES = 4
"""Larger ones may together have this many times the limit of one."""

_CLOSE = {"connection": "close"}


class Bodies:
    """The bodies in hand: those that are arriving, and those that have not been handed to the engine."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0  # bytes of large bodies

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, in hand as long as the block runs; keep nothing of it beyond.

        Raises ApiError: 413 if it is too large, 503 if too many large ones are in hand, 408 if it takes too long or
        if a large one stops coming on.
        """
        if int(request.headers.get("content-length", "0")) > self.limit * DISCARD_FACTOR:
            raise _too_large(self.limit)
        body = _Arriving(self)
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS) as timeout:
                    await self._receive(body, request, timeout)
            except TimeoutError:
                message = f"the body did not arrive within {BODY_SECONDS:g} seconds"
                if body.slow:
                    message = f"of the body came fewer than {LEAST_BYTES} bytes in {LEAST_SECONDS:g} seconds"
                raise ApiError(408, message, code="request_timeout", headers=_CLOSE) from None
            yield body.take()
        finally:
            body.drop()

    async def _receive(self, body: _Arriving, request: Request, timeout: asyncio.Timeout) -> None:
        clock, last = asyncio.get_running_loop().time, timeout.when()
        assert last is not None
        mark: int | None = None  # the size when its pace was last looked at
        async for chunk in request.stream():
            body.add(chunk)
            if body.size > self.limit * DISCARD_FACTOR:
                break
            if body.size > SMALL_BODY_BYTES and (mark is None or body.size - mark >= LEAST_BYTES):
                mark, due = body.size, clock() + LEAST_SECONDS
                body.slow = due < last  # if nothing changes this before the time is up
                timeout.reschedule(min(due, last))


class _Arriving:
    """One body."""

    def __init__(self, bodies: Bodies) -> None:
        self.size = 0
        self.slow = False
        self._bodies = bodies
        self._chunks: list[bytes] = []
        self._counted = 0  # what it adds to ``bodies.held``
        self._refusal: ApiError | None = None

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self._bodies.limit:
            self._refuse(_too_large(self._bodies.limit))
        elif self._refusal is None:
            self._chunks.append(chunk)
            self._count(self.size if self.size > SMALL_BODY_BYTES else 0)
            if self._bodies.held > self._bodies.limit * LARGE_BODIES:
                self._refuse(unavailable("too many large bodies are being read", "too_many_bodies"))

    def take(self) -> bytes:
        """The whole. Raises ApiError if it was refused."""
        if self._refusal is not None:
            raise self._refusal
        whole = b"".join(self._chunks)
        self._chunks.clear()
        return whole

    def drop(self) -> None:
        """It is no longer in hand."""
        self._chunks.clear()
        self._count(0)

    def _refuse(self, error: ApiError) -> None:
        self._refusal = error
        self.drop()

    def _count(self, size: int) -> None:
        self._bodies.held += size - self._counted
        self._counted = size


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large", headers=_CLOSE)
