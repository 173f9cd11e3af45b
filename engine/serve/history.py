"""What is known of a request once it is over: for the access log, and for the caller's own history. Never its text."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from headrace.engine import Usage
from headrace.engine.serve.errors import invalid

HISTORY_LENGTH = 1000
"""Requests remembered for each key."""

PAGE = 20
MAX_PAGE = 100
MAX_AGENT = 200
MAX_PATH = 200
CLIENT_CLOSED = 499
"""Status of a request whose client left before the answer began (nginx's number: HTTP has none)."""

access_log = logging.getLogger("headrace.access")


def new_id() -> str:
    """The id of a request."""
    return f"req-{uuid.uuid4().hex}"


@dataclass(slots=True)
class Record:
    """One HTTP request. Times are in seconds; ``key`` is the number of the API key used, 0 where there was none."""

    id: str
    method: str
    path: str
    agent: str
    client: str | None
    key: int = 0
    created: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    status: int = 0  # 0 until the answer has begun
    error: str | None = None
    generates: bool = False  # it reached a path that generates: the history keeps it
    stream: bool | None = None
    choices: int = 0
    first_token_seconds: float | None = None
    usage: Usage | None = None

    def client_left(self) -> None:
        """The client went away before the answer had ended."""
        self.status = self.status or CLIENT_CLOSED
        self.error = self.error or "client_closed"

    def close(self) -> None:
        """The request is over."""
        self.seconds = time.monotonic() - self.started
        if not self.status:
            self.client_left()

    def body(self) -> dict[str, Any]:
        """The entry of ``/v1/requests``."""
        usage = self.usage or Usage()
        return {
            "id": self.id,
            "object": "request",
            "created": int(self.created),
            "path": self.path,
            "status": self.status,
            "error": self.error,
            "user_agent": self.agent,
            "stream": self.stream,
            "n": self.choices,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "time_to_first_token_seconds": _rounded(self.first_token_seconds),
            "latency_seconds": _rounded(self.seconds),
        }

    def line(self) -> str:
        """The line of the access log: one JSON object. No query string, no header but User-Agent, no text."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(self.created, UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "client": self.client,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "error": self.error,
            "user_agent": self.agent,
            "seconds": _rounded(self.seconds),
        }
        if self.generates:
            usage = self.usage or Usage()
            entry |= {
                "stream": self.stream,
                "n": self.choices,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "reasoning_tokens": usage.reasoning_tokens,
                "cached_tokens": usage.cached_tokens,
                "first_token_seconds": _rounded(self.first_token_seconds),
            }
        return json.dumps(entry)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class History:
    """The last requests of each key, newest first."""

    def __init__(self) -> None:
        self._records: defaultdict[int, deque[Record]] = defaultdict(lambda: deque(maxlen=HISTORY_LENGTH))

    def add(self, record: Record) -> None:
        """Remember a request that is over."""
        self._records[record.key].appendleft(record)

    def page(self, key: int, after: str | None, limit: int) -> dict[str, Any]:
        """At most ``limit`` entries of one key, those behind the entry ``after``. ApiError 422 if it is not there."""
        records = iter(self._records[key])
        if after is not None and not any(record.id == after for record in records):
            raise invalid(f"after must be the id of one of your last {HISTORY_LENGTH} requests", "after")
        page = list(islice(records, limit + 1))
        entries = [record.body() for record in page[:limit]]
        return {
            "object": "list",
            "data": entries,
            "first_id": entries[0]["id"] if entries else None,
            "last_id": entries[-1]["id"] if entries else None,
            "has_more": len(page) > limit,
        }
