"""The named scenarios: what they start, in which order they measure, and under which label a row is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.load.measuring import Record, over_http
from benchmarks.load.processes import PythonApi, Server, Settings, serving
from benchmarks.load.workload import MAX_RATE, Load, Row, Workload

PYTHON, HTTP = "Python API", "HTTP"
CAPACITY, OVERLOAD = "at capacity", "overload"

PAIRED = Load(Workload(max_tokens=192), streams=64, requests=2)
OPEN = Load(Workload(max_tokens=512), streams=500, seconds=600)
FULL = Load(Workload(max_tokens=256), streams=64, seconds=30)
OVERLOAD_FACTOR = 10
OVERLOAD_WAITING = 8
"""Sequences that may queue in the overload scenario: what is admitted is to begin soon, or it does not keep its
latency. (The server's default is a deep queue, 1024: nobody is refused before it is full, and everybody waits.)"""


def scenario(record: Record, name: str, number: int, measure: str, load: Load, settings: Settings, row: Row) -> Row:
    """Record a row with what it is of."""
    config = {
        "prompt_words": load.workload.prompt_words,
        "max_tokens": load.workload.max_tokens,
        "streams": load.streams,
        "rate": load.rate,
        "settings": {key: value for key, value in _settings(settings).items() if value is not None},
    }
    return record.add({"scenario": name, "round": number, "measure": measure, "config": config, **row})


def _settings(settings: Settings) -> Row:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def pairs(record: Record, name: str, load: Load, settings: Settings, rounds: int) -> None:
    """The same requests over HTTP and through the Python API, in turns, each first in every other round.

    Both processes live all the time; the one that is not measured sleeps. A small load first, of which no row is kept.
    """
    with serving(settings) as server, PythonApi(settings) as python:
        sides: list[tuple[str, Callable[[Load], Row]]] = [
            (HTTP, lambda load: over_http(server, load)),
            (PYTHON, python.measure),
        ]
        small = replace(load, seconds=None, rate=None, streams=load.streams or 4, requests=1,
                        workload=replace(load.workload, max_tokens=8))  # fmt: skip
        for _, measure in sides:
            measure(small)
        for number in range(rounds):
            turn = replace(load, first=(number + 1) * 1_000_000)
            for label, measure in sides[:: -1 if number % 2 else 1]:
                scenario(record, name, number, label, turn, settings, measure(turn))


def alone(record: Record, name: str, load: Load, settings: Settings, server: Server, key: str | None = None) -> Row:
    """One load over HTTP."""
    return scenario(record, name, 0, HTTP, load, settings, over_http(server, load, key))


def open500(record: Record, load: Load, settings: Settings) -> None:
    """As many answers decode together as streams are open, so that every stream really streams."""
    settings = replace(settings, max_sequences=settings.max_sequences or load.streams)
    with serving(settings) as server:
        alone(record, "open500", load, settings, server)


def overload(record: Record, load: Load, settings: Settings) -> None:
    """First the capacity, by as many clients as slots; then arrivals at OVERLOAD_FACTOR times what was answered."""
    settings = replace(
        settings, max_sequences=settings.max_sequences or load.streams,
        max_waiting=settings.max_waiting or OVERLOAD_WAITING,
    )  # fmt: skip
    with serving(settings) as server:
        full = over_http(server, load)
        scenario(record, "overload", 0, CAPACITY, load, settings, full)
        rate = min(MAX_RATE, OVERLOAD_FACTOR * full["answered"] / full["seconds"])
        tenfold = replace(load, streams=None, rate=rate, first=1_000_000)
        scenario(record, "overload", 0, OVERLOAD, tenfold, settings, over_http(server, tenfold))
