"""The HTTP client: streams answers and notes when text comes.

It shares the machine with the server, so it must cost little: it parses an answer's head and its end, and of what is
between looks only whether there is text. (httpx takes 80 us of a core for each event, as much as the server itself.)
"""

from __future__ import annotations

import asyncio
import io
import re
import ssl
import time
from http.client import HTTPMessage, parse_headers
from urllib.parse import urlsplit

from benchmarks.load.samples import ANSWERED, REFUSED, Sample
from benchmarks.load.workload import Workload

PATH = "/v1/chat/completions"
TEXT = b'content":"'
"""Stands in every event that has text, of either channel."""

DONE, LAST_CHUNK = b"data: [DONE]\n\n", b"\r\n0\r\n\r\n"
TAIL = 4096
"""Bytes of a stream's end that hold its usage event."""

SECONDS = 600.0  # for one answer
READ_BYTES = 65536

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Client:
    """Asks a server at ``url``. A connection for each open request, kept and used again; for ``drive.drive``."""

    def __init__(self, url: str, workload: Workload, key: str | None = None) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._workload = workload
        lines = [f"POST {parts.path.rstrip('/')}{PATH} HTTP/1.1", f"host: {parts.netloc}"]
        lines += ["content-type: application/json", "accept: text/event-stream", "user-agent: headrace-load"]
        self._head = "\r\n".join([*lines, *([f"authorization: Bearer {key}"] if key else []), "content-length: "])
        self._context = ssl.create_default_context() if self._secure else None
        self._idle: list[Connection] = []

    async def __call__(self, number: int, due: float) -> Sample:
        """Ask once. What fails is in the sample."""
        sample = Sample(due)
        body = self._workload.body(number)
        connection = None
        try:
            async with asyncio.timeout(SECONDS):
                connection = self._idle.pop() if self._idle else await self._connect()
                reader, writer = connection
                writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
                headers = await read_head(reader, sample)
                if sample.status == ANSWERED:
                    await _read_stream(reader, sample)
                else:
                    await _read_refusal(reader, sample, headers)
            if headers.get("connection", "").lower() != "close":
                self._idle.append(connection)
                connection = None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            sample.error = f"{type(error).__name__}: {error}"
        finally:
            if connection is not None:
                connection[1].close()
        sample.end = time.monotonic()
        return sample

    async def close(self) -> None:
        """Close every connection; no request may be open."""
        for _, writer in self._idle:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self._idle), return_exceptions=True)
        self._idle.clear()

    async def _connect(self) -> Connection:
        return await asyncio.open_connection(self._host, self._port, ssl=self._context)


async def read_head(reader: asyncio.StreamReader, sample: Sample) -> HTTPMessage:
    """An answer's status, into the sample, and its headers. Raises ValueError for what is no HTTP."""
    status, _, head = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
    if not (found := re.match(rb"HTTP/1\.1 (\d{3}) ", status)):
        raise ValueError(f"no HTTP/1.1: {status[:100]!r}")
    sample.status = int(found[1])
    return parse_headers(io.BytesIO(head))


async def _read_stream(reader: asyncio.StreamReader, sample: Sample) -> None:
    tail = b""
    while not tail.endswith(LAST_CHUNK):
        data = await reader.read(READ_BYTES)
        if not data:
            raise EOFError("the connection ended inside a stream")
        if TEXT in data:
            sample.arrived()
        tail = (tail + data)[-TAIL:]
    sample.tokens = tokens_of(tail)


def tokens_of(tail: bytes) -> int:
    """Completion tokens by the usage event at a stream's end. ValueError for a stream that does not end in order."""
    if DONE not in tail:
        raise ValueError("an error event" if b'data: {"error"' in tail else "the stream ended without [DONE]")
    counts = re.findall(rb'"completion_tokens":(\d+)', tail)
    if not counts:
        raise ValueError("the stream has no usage event")
    return int(counts[-1])


async def _read_refusal(reader: asyncio.StreamReader, sample: Sample, headers: HTTPMessage) -> None:
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    after = headers.get("retry-after")
    sample.retry_after = float(after) if after is not None else None
    if sample.status != REFUSED:
        sample.error = f"{sample.status}: {body[:200].decode(errors='replace')}"
