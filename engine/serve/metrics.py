"""Prometheus metrics: vLLM's stems under our prefix, so that its dashboards work after a search and replace."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from headrace.engine import Delta, Finished, Usage
from headrace.engine.serve.bodies import Tally
from headrace.engine.serve.history import Record

if TYPE_CHECKING:
    from headrace.engine import Engine

PREFIX = "headrace:"
LABEL = "model_name"

# In seconds; vLLM's, so that quantiles of both are cut at the same places.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that finished.",
    "generation_tokens": "Tokens decided, forced ones and those of aborted requests included.",
    "reasoning_tokens": "Tokens decided freely while thinking.",
    "reasoning_budget_forced": "Choices whose reasoning ended exactly at its budget.",
    "reasoning_truncated": "Choices that reached max_tokens while still thinking.",
    "prefix_cache_queries": "Prompt tokens looked up among cached prefixes.",
    "prefix_cache_hits": "Prompt tokens found among cached prefixes.",
    "request_failed": "Choices that failed while generating.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to a choice's first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Time per token between two events of a choice.", _BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("From a request's arrival to its answer's end.", _REQUEST),
    "request_queue_time_seconds": ("A choice's wait for a slot.", _REQUEST),
    "request_prefill_time_seconds": ("From a choice's admission to its first token.", _REQUEST),
    "request_decode_time_seconds": ("From a choice's first token to its end.", _REQUEST),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens decided for a choice.", _TOKENS),
}


class EngineCollector(Collector):
    """The engine's counts of the moment, read when they are asked for."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterable[Any]:
        """The families."""
        stats = self._engine.stats()
        gauges = {
            "num_requests_running": ("Choices that are being generated.", stats["running"]),
            "num_requests_waiting": ("Choices that wait for a slot.", stats["waiting"]),
            "kv_cache_usage_perc": ("KV pages in use, 1 is all.", _used(stats, "pages")),
            "state_cache_usage_perc": ("Mamba state slots in use, 1 is all.", _used(stats, "slots")),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=[LABEL])
            gauge.add_metric([self._model], value)
            yield gauge
        preemptions = CounterMetricFamily(PREFIX + "num_preemptions", "Preempted sequences.", labels=[LABEL])
        preemptions.add_metric([self._model], stats["preemptions"])
        yield preemptions


def _used(stats: dict[str, int], what: str) -> float:
    return 1 - stats[f"free_{what}"] / stats[f"total_{what}"]


class Metrics:
    """All metrics of one server and its model."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self._registry)
        self._registry.register(EngineCollector(engine, model))
        self._counters = {
            name: Counter(PREFIX + name, text, [LABEL], registry=self._registry).labels(model)
            for name, text in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(PREFIX + name, text, [LABEL], buckets=buckets, registry=self._registry).labels(model)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        success = Counter(
            PREFIX + "request_success", "Choices that finished.", [LABEL, "finished_reason"], registry=self._registry
        )
        self._success = {reason: success.labels(model, reason) for reason in ("stop", "length")}
        aborted = Counter(
            PREFIX + "aborted", "Choices that ended before they finished.", [LABEL, "phase"], registry=self._registry
        )
        self._aborted = {phase: aborted.labels(model, phase) for phase in ("waiting", "generating")}
        self._http = Counter(
            PREFIX + "http_requests", "HTTP requests answered.", ["path", "status"], registry=self._registry
        )

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a counter."""
        self._counters[name].inc(amount)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._histograms[name].observe(value)

    def finished(self, reason: str) -> None:
        """A choice ended with an answer."""
        self._success[reason].inc()

    def aborted(self, phase: str) -> None:
        """A choice ended without having finished; the phase is "waiting" or "generating"."""
        self._aborted[phase].inc()

    def answered(self, path: str, status: int) -> None:
        """An HTTP request is over. ``path`` is a route's, never what a client wrote."""
        self._http.labels(path, str(status)).inc()


class Watch:
    """Follows the events of one request, as a context manager around its answer: for its record and the metrics.

    ``budget`` is that of the reasoning, None where nothing is reasoned; there are ``n`` choices for each prompt.
    """

    def __init__(self, record: Record, metrics: Metrics, budget: int | None, n: int, prompts: int = 1) -> None:
        self._record = record
        self._metrics = metrics
        self._budget = budget
        self._tally = Tally(n)
        self._open = {index: Usage() for index in range(n * prompts)}  # what has been seen of those that have not ended
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}

    def see(self, event: Delta | Finished) -> None:
        """Take in one event as it goes out."""
        now = time.monotonic()
        if event.token_ids:
            self._arrived(event.index, len(event.token_ids), now)
        if isinstance(event, Delta):
            tokens = len(event.token_ids)
            self._open[event.index] += Usage(0, tokens, tokens if event.channel == "reasoning" else 0)
        else:
            del self._open[event.index]
            self._tally.add(event.index, event.usage)
            self._finished(event, now)

    def _arrived(self, index: int, tokens: int, now: float) -> None:
        self._metrics.count("generation_tokens", tokens)
        if index not in self._first:
            self._first[index] = now
            waited = now - self._record.started
            self._metrics.observe("time_to_first_token_seconds", waited)
            if self._record.first_token_seconds is None:
                self._record.first_token_seconds = waited
        else:
            self._metrics.observe("inter_token_latency_seconds", (now - self._last[index]) / tokens)
        self._last[index] = now

    def _finished(self, event: Finished, now: float) -> None:
        metrics, usage = self._metrics, event.usage
        metrics.count("reasoning_tokens", usage.reasoning_tokens)
        if event.reason == "error":
            metrics.count("request_failed")
        elif event.reason == "abort":
            self._abort(event.index)
        else:
            metrics.finished(event.reason)
            metrics.observe("request_generation_tokens", usage.completion_tokens)
            self._times(event, now)
        if self._budget is not None:
            self._reasoning(event)

    def _times(self, event: Finished, now: float) -> None:
        first = self._first.get(event.index)
        if first is None or event.queue_seconds is None:
            return
        prefill = first - self._record.started - event.queue_seconds
        self._metrics.observe("request_queue_time_seconds", event.queue_seconds)
        self._metrics.observe("request_prefill_time_seconds", max(0.0, prefill))
        self._metrics.observe("request_decode_time_seconds", now - first)

    def _reasoning(self, event: Finished) -> None:
        usage = event.usage
        closed = usage.completion_tokens > usage.reasoning_tokens
        if closed and usage.reasoning_tokens == self._budget:
            self._metrics.count("reasoning_budget_forced")
        if not closed and event.reason == "length":
            self._metrics.count("reasoning_truncated")

    def _abort(self, index: int) -> None:
        self._metrics.aborted("generating" if index in self._first else "waiting")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """No more events are read: choices that have not ended were given up."""
        metrics, record = self._metrics, self._record
        for index, seen in self._open.items():
            self._abort(index)
            self._tally.add(index, seen)
            metrics.count("reasoning_tokens", seen.reasoning_tokens)
        usage = record.usage = self._tally.total()
        if kind is None and record.error is None:
            metrics.count("prompt_tokens", usage.prompt_tokens)
            metrics.count("prefix_cache_queries", usage.prompt_tokens)
            metrics.count("prefix_cache_hits", usage.cached_tokens)
            metrics.observe("request_prompt_tokens", usage.prompt_tokens)
            metrics.observe("e2e_request_latency_seconds", time.monotonic() - record.started)
