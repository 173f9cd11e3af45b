"""Server-sent events: one ``data: {json}`` and a blank line for each chunk, ``data: [DONE]`` at the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive

from headrace.engine import Delta, Finished, Stream
from headrace.engine.serve.bodies import Chunks
from headrace.engine.serve.errors import ApiError, internal

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"

# Line ends to some clients' line readers, though not to the SSE standard. Legal in JSON, raw or escaped.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

logger = logging.getLogger(__name__)


def event(payload: dict[str, Any]) -> bytes:
    """One event."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.translate(_LINE_ENDS).encode() + b"\n\n"


async def events_of(
    chunks: Chunks, first: Delta | Finished, rest: AsyncIterator[Delta | Finished]
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
    except ApiError as error:
        yield event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield event(internal().body())


@asynccontextmanager
async def abort_on_disconnect(receive: Receive, stream: Stream) -> AsyncIterator[None]:
    """Abort the stream as soon as the client is gone. The request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
