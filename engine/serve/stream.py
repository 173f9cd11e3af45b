"""Server-sent events: one ``data: {json}`` and a blank line for each chunk, ``data: [DONE]`` at the end."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import Receive

from headrace.engine import Delta, Finished, Stream
from headrace.engine.errors import trace
from headrace.engine.serve.bodies import Chunks
from headrace.engine.serve.errors import ApiError, internal
from headrace.engine.serve.history import Record

HEADERS = {"cache-control": "no-store, no-transform", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"

# Line ends to some clients' line readers, though not to the SSE standard. Legal in JSON, raw or escaped.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_HOLE = uuid.uuid4().hex
"""Where a delta's text goes in its event; nothing else that is in an event can be guessed to hold it."""

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
    return b"data: " + _json(payload) + b"\n\n"


def _json(value: Any) -> bytes:
    text = _encode(value)
    return text.encode() if text.isascii() else text.translate(_LINE_ENDS).encode()


class EventWriter:
    """The bytes of a stream's events.

    Of a choice's deltas in one channel nothing differs but the text: what stands around it is made once.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._around: dict[tuple[int, str], tuple[bytes, bytes]] = {}

    def of(self, item: Delta | Finished) -> bytes:
        """The events that an engine's event stands for; none is b"". Raises ApiError for an end that is no answer."""
        if not isinstance(item, Delta) or not self._chunks.is_text_alone(item):
            return b"".join([event(chunk) for chunk in self._chunks.of(item)])
        around = self._around.get((item.index, item.channel))
        if around is None:
            [chunk] = self._chunks.of(replace(item, text=_HOLE))
            head, tail = event(chunk).split(b'"' + _HOLE.encode() + b'"')
            around = self._around[item.index, item.channel] = head, tail
        return around[0] + _json(item.text) + around[1]


async def events_of(
    chunks: Chunks, first: Delta | Finished, rest: AsyncIterator[Delta | Finished], record: Record
) -> AsyncIterator[bytes]:
    """The bytes of a whole stream. A failure after the first byte is one error event, and no ``[DONE]``."""
    writer = EventWriter(chunks)
    try:
        if data := writer.of(first):
            yield data
        async for item in rest:
            if data := writer.of(item):
                yield data
        usage = chunks.usage()
        yield DONE if usage is None else event(usage) + DONE
    except Exception as error:
        if not isinstance(error, ApiError):
            logger.error("request %s failed in its stream: %s", record.id, trace(error))
            error = internal()
        record.error = record.error or error.code
        yield event(error.body())


class Client:
    """Whoever waits for an answer. When it leaves, what it waits for is aborted."""

    def __init__(self, receive: Receive, record: Record) -> None:
        self.gone = False
        self._receive = receive
        self._record = record
        self._events: Events | None = None
        self._watcher: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Notice from now on if it leaves. The request's body must have been read."""
        self._watcher = asyncio.create_task(self._wait())

    def waits_for(self, events: Events) -> None:
        """This is what it asked for."""
        self._events = events
        if self.gone:
            events.abort()

    def close(self) -> None:
        """It has its answer."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._record.client_left()
        if self._events is not None:
            self._events.abort()
