"""Server-sent events: one ``data: {json}`` and a blank line for each chunk, ``data: [DONE]`` at the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import Receive

from headrace.engine import Delta, Finished, Stream
from headrace.engine.serve.bodies import Chunks
from headrace.engine.serve.errors import ApiError, internal, trace
from headrace.engine.serve.history import Record

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"

# Line ends to some clients' line readers, though not to the SSE standard. Legal in JSON, raw or escaped.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

logger = logging.getLogger(__name__)


class Events(Protocol):
    """What is being generated for one request."""

    def abort(self) -> None:
        """End what is unfinished; each of it still gets its Finished."""

    def close(self) -> None:
        """The same, and nobody reads on."""

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """The events, once."""


class Streams:
    """The streams of several prompts as one; choice j of prompt i has the index i * n + j."""

    def __init__(self, streams: Sequence[Stream], n: int) -> None:
        self._streams = streams
        self._n = n
        self._pumps: list[asyncio.Task[None]] = []

    def abort(self) -> None:
        """End every unfinished choice."""
        for stream in self._streams:
            stream.abort()

    def close(self) -> None:
        """End every unfinished choice; nobody reads on."""
        self.abort()
        for pump in self._pumps:
            pump.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """Whatever comes first. A slow reader makes the streams wait, and what waits there is put together."""
        queue: asyncio.Queue[Delta | Finished | Exception | None] = asyncio.Queue(maxsize=1)
        self._pumps = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self._streams))]
        left = len(self._pumps)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item

    async def _pump(self, prompt: int, queue: asyncio.Queue[Delta | Finished | Exception | None]) -> None:
        try:
            async for event in self._streams[prompt]:
                await queue.put(replace(event, index=prompt * self._n + event.index))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)


def event(payload: dict[str, Any]) -> bytes:
    """One event."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.translate(_LINE_ENDS).encode() + b"\n\n"


async def events_of(
    chunks: Chunks, first: Delta | Finished, rest: AsyncIterator[Delta | Finished], record: Record
) -> AsyncIterator[bytes]:
    """The bytes of a whole stream. A failure after the first byte is one error event, and no ``[DONE]``."""
    try:
        for chunk in chunks.of(first):
            yield event(chunk)
        async for item in rest:
            for chunk in chunks.of(item):
                yield event(chunk)
        if (usage := chunks.usage()) is not None:
            yield event(usage)
        yield DONE
    except Exception as error:
        if not isinstance(error, ApiError):
            logger.error("request %s failed in its stream: %s", record.id, trace(error))
            error = internal()
        record.error = record.error or error.code
        yield event(error.body())


@asynccontextmanager
async def abort_on_disconnect(receive: Receive, events: Events, record: Record) -> AsyncIterator[None]:
    """Abort as soon as the client is gone. The request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        record.client_left()
        events.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
