"""``python -m benchmarks.load``: a scenario, or a load of your own; rows, tables and a picture of what was seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import typer

from benchmarks.load import scenarios, summary
from benchmarks.load.measuring import Record
from benchmarks.load.processes import LoadError, Server, Settings, serving, wait_ready
from benchmarks.load.workload import MAX_RATE, MAX_SECONDS, MAX_STREAMS, Load, Workload
from benchmarks.rows import ROOT
from headrace.engine.serve.access import is_loopback_name

Scenario = Literal["streams64", "open500", "overload", "own"]
MAX_MINUTES = MAX_SECONDS / 60


def main(
    scenario: Annotated[
        Scenario,
        typer.Argument(
            help="streams64: 64 streams over HTTP and through the Python API, in turns. open500: 500 streams, errors "
            "and memory. overload: 10 times the capacity. own: what --streams or --rate say."
        ),
    ] = "own",
    streams: Annotated[int | None, typer.Option(min=1, max=MAX_STREAMS, help="Closed loop: clients.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.01, max=MAX_RATE, help="Open loop: requests a second.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, max=MAX_SECONDS, help="How long new requests begin.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, max=MAX_MINUTES, help="The same, of open500.")] = 10,
    requests: Annotated[int | None, typer.Option(min=1, help="Of each stream, instead of --seconds.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Turns beside the Python API.")] = 3,
    compare_python: Annotated[
        bool, typer.Option("--compare-python", help="The same requests through the Python API too.")
    ] = False,
    prompt_words: Annotated[int, typer.Option(min=1, max=10_000, help="Length of a question.")] = 16,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=32768, help="Tokens of every answer.", show_default="128; the scenario's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of questions, arrivals and answers.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="A server that runs, instead of one of our own.", show_default="our own")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="HEADRACE_API_KEY", help="Its API key.")] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="--url may be another machine's.")] = False,
    model: Annotated[str | None, typer.Option(help="Folder of a checkpoint.", show_default="the embedded one")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels of our own server.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of its kernels.")] = None,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Its answers generated together.")] = None,
    max_waiting: Annotated[int | None, typer.Option(min=1, help="Its answers that may queue.")] = None,
    out: Annotated[Path | None, typer.Option(help="The rows (.jsonl); .md and .png come beside them.")] = None,
) -> None:
    """Put a server of our own, or the one at --url, under load."""
    settings = Settings(model, backend, threads, max_sequences, max_waiting)
    if url is not None:
        _check_url(url, allow_remote, alone=scenario == "own" and not compare_python)
    path = out or ROOT / "benchmarks" / "results" / f"load-{scenario}-{time.strftime('%Y-%m-%d-%H%M%S')}.jsonl"
    load = _load(scenario, streams, rate, 60 * minutes if scenario == "open500" else seconds, requests)
    tokens = load.workload.max_tokens if max_tokens is None else max_tokens
    load = replace(load, workload=Workload(prompt_words, tokens, seed=seed))
    record = Record(path)
    try:
        if scenario == "streams64" or compare_python:
            scenarios.pairs(record, scenario, load, settings, rounds)
        elif scenario == "open500":
            scenarios.open500(record, load, settings)
        elif scenario == "overload":
            scenarios.overload(record, load, settings)
        else:
            with _server(url, settings) as server:
                scenarios.alone(record, scenario, load, settings, server, key)
    except LoadError as error:
        typer.echo(f"load: {error}", err=True)
        raise typer.Exit(1) from error
    _tell(record)


@contextmanager
def _server(url: str | None, settings: Settings) -> Iterator[Server]:
    if url is None:
        with serving(settings) as server:
            yield server
    else:
        wait_ready(url.rstrip("/"), 10)
        yield Server(url.rstrip("/"))


def _tell(record: Record) -> None:
    path, text = record.path, summary.markdown(record.rows)
    path.with_suffix(".md").write_text(text)
    summary.plot(record.rows, path.with_suffix(".png"))
    print(f"\n{text}\nwrote {path} and its .md and .png")


def _load(
    scenario: Scenario, streams: int | None, rate: float | None, seconds: float | None, requests: int | None
) -> Load:
    """The scenario's load, with what was given in place of its own. Raises typer.BadParameter."""
    base = {"streams64": scenarios.PAIRED, "open500": scenarios.OPEN, "overload": scenarios.FULL}.get(scenario)
    if base is not None and rate is not None:
        raise typer.BadParameter(f"--rate: {scenario} has streams")
    if scenario == "overload" and requests is not None:
        raise typer.BadParameter("--requests: overload takes --seconds, its arrivals wait for nobody")
    if base is not None:
        streams = streams or base.streams
        if seconds is None and requests is None:
            seconds, requests = base.seconds, base.requests
    elif seconds is None and requests is None:
        seconds = 30.0
    try:
        return Load(base.workload if base else Workload(), streams, rate, seconds, requests)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_url(url: str, allow_remote: bool, alone: bool) -> None:
    if not alone:
        raise typer.BadParameter("--url: the scenarios and --compare-python measure a server of their own")
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise typer.BadParameter(f"--url {url}: {error}") from error
    if parts.scheme not in ("http", "https") or host is None:
        raise typer.BadParameter(f"--url takes http://HOST:PORT, got {url}")
    if not allow_remote and not is_loopback_name(host):
        raise typer.BadParameter(f"--url {url} is not this machine's loopback: --allow-remote, if it is yours to load")


if __name__ == "__main__":
    typer.run(main)
