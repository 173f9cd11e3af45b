"""What one request saw, and what many saw together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.load.workload import Row

PERCENTILES = (50, 90, 99)
ANSWERED, REFUSED = 200, 429


@dataclass(slots=True)
class Sample:
    """One request. Times are of the monotonic clock, in seconds, and count from when it was due.

    A client that is late makes its own lateness part of the latency, instead of asking less of a slow server.
    """

    due: float
    status: int = 0  # 0: no answer came
    first: float | None = None  # the first text
    last: float = 0.0  # the last text
    end: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds between two arrivals of text
    retry_after: float | None = None
    error: str | None = None

    def arrived(self) -> None:
        """More text is here."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now

    @property
    def answered(self) -> bool:
        """Whether it was answered in full."""
        return self.status == ANSWERED and self.error is None


def figures(samples: Sequence[Sample], seconds: float) -> Row:
    """A row's figures. Latencies in seconds, as percentiles; ``tokens_per_s`` is over all ``seconds``.

    ttft         from when a request was due to its first text
    inter_token  of each answer: the time from its first text to its last, over its tokens but one
    gap          between two arrivals of text of one answer, whatever number of tokens came
    e2e          from when a request was due to the end of its answer
    refused      from when a request was due to its 429
    """
    answered = [sample for sample in samples if sample.answered]
    refused = [sample for sample in samples if sample.status == REFUSED]
    tokens = sum(sample.tokens for sample in answered)
    started = [sample for sample in answered if sample.first is not None]
    return {
        "requests": len(samples),
        "answered": len(answered),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "arrivals": sum(1 + len(sample.gaps) for sample in started),
        "ttft_s": percentiles([sample.first - sample.due for sample in started if sample.first is not None]),
        "inter_token_s": percentiles(
            [(sample.last - sample.first) / (sample.tokens - 1) for sample in started if sample.first is not None
             and sample.tokens > 1]
        ),
        "gap_s": percentiles([gap for sample in answered for gap in sample.gaps]),
        "e2e_s": percentiles([sample.end - sample.due for sample in answered]),
        "refused_s": percentiles([sample.end - sample.due for sample in refused]),
        "retry_after_s": spread([sample.retry_after for sample in refused if sample.retry_after is not None]),
        "refused_without_retry_after": sum(sample.retry_after is None for sample in refused),
        "statuses": dict(sorted(Counter(str(sample.status) for sample in samples).items())),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> Row | None:
    """p50, p90, p99; None of nothing."""
    if not values:
        return None
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def spread(values: Sequence[float]) -> Row | None:
    """Least, median, most; None of nothing."""
    return {"least": min(values), "median": float(np.median(values)), "most": max(values)} if values else None
