"""The load script: what it asks, what it computes, what it refuses; and once against a real server of its own."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from live_server import live
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished
from typer.testing import CliRunner

from benchmarks.load import __main__ as script
from benchmarks.load import scenarios, summary
from benchmarks.load.client import Client, tokens_of
from benchmarks.load.drive import drive
from benchmarks.load.measuring import Record, memory_figures, over_http
from benchmarks.load.processes import LoadError, Memory, Process, Server, Settings, serving
from benchmarks.load.samples import Sample, figures
from benchmarks.load.workload import MAX_RATE, MAX_STREAMS, Load, Row, Workload
from headrace.engine import QueueFull

APP = typer.Typer()
APP.command()(script.main)


def run(tmp_path: Path, *arguments: str) -> SimpleNamespace:
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(APP, [*arguments, "--out", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return SimpleNamespace(result=result, rows=rows, file=file)


# --- against a real server ------------------------------------------------------------------------------------------


def test_a_server_of_its_own_beside_the_python_api(tmp_path: Path) -> None:
    options = "--streams 2 --requests 2 --max-tokens 5 --compare-python --rounds 2 --threads 1"
    done = run(tmp_path, "own", *options.split())
    assert done.result.exit_code == 0, done.result.output
    assert [row["measure"] for row in done.rows] == ["HTTP", "Python API", "Python API", "HTTP"]
    for row in done.rows:
        assert (row["requests"], row["answered"], row["tokens"]) == (4, 4, 20)
        assert row["statuses"] == {"200": 4}
        assert not row["errors"]
        assert row["config"]["settings"] == {"threads": 1}
        assert row["tokens_per_s"] == pytest.approx(20 / row["seconds"])
        assert 0 < row["ttft_s"]["p50"] <= row["e2e_s"]["p50"] <= row["e2e_s"]["p99"] <= row["seconds"]
        assert row["device"] and row["commit"] and len(row["load_average"]) == 3
    over_http = [row for row in done.rows if row["measure"] == "HTTP"]
    assert all(row["cpu_s"].keys() == {"client", "server"} and row["memory_peak_bytes"] > 1e7 for row in over_http)
    text = done.file.with_suffix(".md").read_text()
    assert "of the Python API's tokens/s (median of rounds: " in text
    assert done.file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(LoadError, match="max_sequences must be an integer >= 1"), serving(Settings(max_sequences=0)):
        pass


# --- against a scripted one -----------------------------------------------------------------------------------------


def load(**fields: Any) -> Load:
    return Load(**{"workload": Workload(max_tokens=7), "streams": 3, "requests": 2} | fields)


def test_each_client_asks_when_it_is_answered() -> None:
    engine = ScriptedEngine()
    with live(engine) as server:
        row = over_http(Server(server.url), load())
    assert (row["requests"], row["answered"], row["tokens"]) == (6, 6, 30)  # the script says 5 of each
    assert 6 <= row["arrivals"] <= 24  # four deltas an answer, some of which arrive together
    asked = [call.prompt[0]["content"] for call in engine.calls]
    assert sorted(asked) == sorted(Workload().messages(number)[0]["content"] for number in range(6))
    assert {(call.params.max_tokens, call.params.ignore_eos) for call in engine.calls} == {(7, True)}
    assert {call.params.seed for call in engine.calls} == set(range(6))
    assert "memory" not in row  # nobody's process
    assert row["cpu_s"].keys() == {"client"}


def test_what_is_refused_is_counted_with_its_retry_after() -> None:
    engine = ScriptedEngine(answer(), QueueFull(3, 2), QueueFull(3, 2))
    with live(engine) as server:
        row = over_http(Server(server.url), load(streams=1, requests=3))
    assert row["statuses"] == {"200": 1, "429": 2}
    assert row["answered"] == 1
    assert not row["errors"]
    assert row["retry_after_s"]["least"] >= 1
    assert row["refused_without_retry_after"] == 0
    assert row["refused_s"]["p50"] > 0


def test_streams_that_fail_are_errors() -> None:
    broken = [delta("content", "It "), finished("error", error="no")]
    with live(ScriptedEngine(RuntimeError("no"), broken, broken, answer())) as server:
        row = over_http(Server(server.url), load(streams=1, requests=4))
    assert row["statuses"] == {"200": 3, "500": 1}
    assert row["answered"] == 1
    assert sum(row["errors"].values()) == 3
    assert row["errors"].pop("ValueError: an error event") == 2
    assert next(iter(row["errors"])).startswith("500: ")


def test_a_server_that_is_gone_is_an_error() -> None:
    with live(ScriptedEngine()) as server:
        url = server.url
    row = over_http(Server(url), load(streams=2, requests=1))
    assert row["statuses"] == {"0": 2}
    assert row["answered"] == 0
    assert row["tokens_per_s"] == 0
    assert row["ttft_s"] is None


def test_arrivals_do_not_wait_for_answers() -> None:
    """Every answer waits until all have arrived."""
    engine = ScriptedEngine([delta("content", "x"), HOLD, finished()])

    async def both(url: str) -> tuple[list[Sample], float]:
        arrivals = load(streams=None, requests=None, rate=200, seconds=0.2)
        client = Client(url, arrivals.workload)
        driving = asyncio.create_task(drive(client, arrivals))
        await asyncio.sleep(0.5)
        for stream in engine.streams:
            stream.release()
        try:
            return await driving
        finally:
            await client.close()

    with live(engine) as server:
        samples, seconds = asyncio.run(both(server.url))
    assert seconds >= 0.4
    assert 10 < len(samples) < 90  # 40 on average
    assert len(engine.calls) == len(samples)
    assert all(sample.answered for sample in samples)
    assert len({sample.due for sample in samples}) == len(samples)


def test_arrivals_are_the_same_for_the_same_seed() -> None:
    async def dues(seed: int) -> list[float]:
        start = time.monotonic()

        async def ask(number: int, due: float) -> Sample:
            return Sample(due - start, end=time.monotonic())

        arrivals = load(streams=None, requests=None, rate=1000, seconds=0.1, workload=Workload(seed=seed))
        return [sample.due for sample in (await drive(ask, arrivals))[0]]

    first, again, other = (asyncio.run(dues(seed)) for seed in (1, 1, 2))
    gaps, gaps_again = ([b - a for a, b in zip(d, d[1:], strict=False)] for d in (first, again))
    assert gaps == pytest.approx(gaps_again, abs=1e-6)
    assert other[:5] != pytest.approx(first[:5], abs=1e-4)


def test_the_overload_scenario(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, asked = ScriptedEngine(), []

    @contextmanager
    def scripted(settings: Settings) -> Iterator[Server]:
        asked.append(settings)
        with live(engine) as server:
            yield Server(server.url, Process(os.getpid()))

    monkeypatch.setattr(scenarios, "serving", scripted)
    done = run(tmp_path, "overload", "--streams", "2", "--seconds", "0.2", "--max-tokens", "3")
    assert done.result.exit_code == 0, done.result.output
    assert asked == [Settings(max_sequences=2, max_waiting=scenarios.OVERLOAD_WAITING)]
    full, over = done.rows
    assert over["config"]["rate"] == pytest.approx(min(MAX_RATE, 10 * full["answered"] / full["seconds"]))
    assert (full["measure"], over["measure"]) == ("at capacity", "overload")
    assert "of admitted requests at p50 / p99 is" in done.file.with_suffix(".md").read_text()


def test_the_open_streams_scenario(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def scripted(settings: Settings) -> Iterator[Server]:
        assert settings.max_sequences == 20  # as many as streams
        with live(ScriptedEngine()) as server:
            yield Server(server.url, Process(os.getpid()))

    monkeypatch.setattr(scenarios, "serving", scripted)
    done = run(tmp_path, "open500", "--streams", "20", "--minutes", "0.01")
    assert done.result.exit_code == 0, done.result.output
    [row] = done.rows
    assert row["answered"] == row["requests"] >= 20
    assert row["memory_peak_bytes"] >= row["memory"][0][1] > 1e7
    assert "resident set was at most" in done.file.with_suffix(".md").read_text()


# --- figures --------------------------------------------------------------------------------------------------------


def sample(due: float, first: float, last: float, end: float, tokens: int, **fields: Any) -> Sample:
    return Sample(due, 200, first, last, end, tokens, **fields)


def test_latencies_count_from_when_a_request_was_due() -> None:
    seen = [sample(10, 11, 13, 14, 5, gaps=[0.5, 1.5]), sample(10, 13, 13, 13, 1), Sample(10, 429, end=10.5)]
    row = figures(seen, 8.0)
    assert (row["requests"], row["answered"], row["tokens"], row["tokens_per_s"]) == (3, 2, 6, 0.75)
    assert row["ttft_s"] == {"p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98)}
    assert row["inter_token_s"]["p50"] == 0.5  # the one answer with more than one token
    assert row["gap_s"]["p50"] == 1.0
    assert row["e2e_s"]["p50"] == 3.5
    assert row["refused_s"]["p99"] == 0.5
    assert row["refused_without_retry_after"] == 1
    assert row["arrivals"] == 4


def test_an_answer_that_broke_off_gives_no_figures() -> None:
    row = figures([sample(0, 1, 2, 3, 0, error="EOFError: cut", gaps=[1.0])], 1.0)
    assert (row["answered"], row["ttft_s"], row["gap_s"]) == (0, None, None)
    assert row["errors"] == {"EOFError: cut": 1}


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":41}}\n\n'


def test_tokens_are_those_that_the_usage_event_counts() -> None:
    assert tokens_of(b'data: {"usage":null}\n\n' + USAGE + b"data: [DONE]\n\n\r\n0\r\n\r\n") == 41
    for tail, problem in (
        (USAGE, r"without \[DONE\]"), (b'data: {"error":{}}\n\n', "an error event"),
        (b"data: [DONE]\n\n", "no usage event"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            tokens_of(tail)


def test_memory_that_grows_has_a_slope_and_what_came_before_it_settled_does_not_count() -> None:
    assert memory_figures([]) == {}
    settled = [(float(second), 500 if second > 20 else 5 * second) for second in range(101)]
    assert memory_figures(settled)["memory_bytes_per_minute"] == pytest.approx(0, abs=300)
    growing = [(float(second), 10 * second) for second in range(101)]
    assert memory_figures(growing)["memory_bytes_per_minute"] == pytest.approx(600)
    assert memory_figures(growing)["memory_peak_bytes"] == 1000


def test_a_memory_curve_is_thinned_out() -> None:
    memory = Memory(None)
    memory.points = [(float(i), i) for i in range(1000)]
    assert len(memory.curve()) == 250
    memory.points = memory.points[:7]
    assert len(memory.curve()) == 7


def row(measure: str, number: int, rate: float, **fields: Any) -> Row:
    seen = figures([sample(0, 1, 2, 3, 4, gaps=[0.5, 0.5])], 1.0)
    said = {"scenario": "streams64", "measure": measure, "round": number, "cpu_s": {}, "load_average": [0.5]}
    return {**seen, **said, "device": "a device", "commit": "abc", "tokens_per_s": rate, **fields}


def test_ratios_are_of_the_same_round() -> None:
    rows = [row("HTTP", 0, 90.0), row("Python API", 0, 100.0), row("Python API", 1, 50.0), row("HTTP", 1, 40.0)]
    rows += [row("HTTP", 2, 1.0)]  # beside nothing
    assert summary.ratios(rows) == [0.9, 0.8]
    assert "HTTP gives 85.0% of the Python API's tokens/s (median of rounds: 0.900, 0.800)" in summary.markdown(rows)


def test_overload_is_told_beside_capacity() -> None:
    over = figures([sample(0, 1, 4, 6, 4), Sample(0, 429, end=0.002, retry_after=3.0), Sample(0, 429, end=0.002)], 1.0)
    rows = [row("at capacity", 0, 9.0, scenario="overload"), {**row("overload", 0, 9.0, scenario="overload"), **over}]
    text = summary.markdown(rows)
    assert "the whole time of admitted requests at p50 / p99 is 2.00 / 2.00 times that at capacity" in text
    assert "429 came within 2 / 2 / 2 ms (p50 / p90 / p99), Retry-After 3 to 3 s, missing in 1" in text


def test_rows_have_their_machine(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "rows.jsonl")
    bare = {key: value for key, value in row("HTTP", 0, 1.0).items() if key not in ("device", "commit", "load_average")}
    record.add(bare)
    [read] = [json.loads(line) for line in record.path.read_text().splitlines()]
    assert read == record.rows[0]
    assert read.keys() >= {"device", "commit", "time", "load_average"}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "problem"), [
    (["--url", "http://192.0.2.1:8000", "--streams", "1"], "--allow-remote"),
    (["--url", "http://localhost.evil.example", "--streams", "1"], "--allow-remote"),
    (["--url", "ftp://localhost", "--streams", "1"], "--url"),
    (["--url", "http://localhost:1", "--streams", "1", "--compare-python"], "--url"),
    ([], "streams or a rate"), (["--streams", "1", "--rate", "1"], "streams or a rate"),
    (["--rate", "1", "--requests", "1"], "so many seconds"), (["--streams", "0"], "--streams"),
    (["--streams", str(MAX_STREAMS + 1)], "--streams"), (["--streams", "1", "--seconds", "9999"], "--seconds"),
    (["overload", "--rate", "1"], "--rate"), (["overload", "--requests", "1"], "--requests"), (["peak"], "peak"),
])  # fmt: skip
def test_options_that_mean_nothing(tmp_path: Path, arguments: list[str], problem: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.result.exit_code == 2, done.result.output
    assert problem in " ".join(done.result.output.replace("│", " ").split())
    assert not done.file.exists()


@pytest.mark.parametrize("fields", [
    {"streams": None}, {"rate": 1.0}, {"requests": None}, {"streams": MAX_STREAMS + 1}, {"seconds": 1e9},
    {"streams": None, "rate": 1.0}, {"streams": None, "rate": 1e9, "seconds": 1.0},
])  # fmt: skip
def test_loads_are_bounded(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="load|streams|rate|seconds"):
        load(**fields)


def test_a_load_survives_the_way_to_another_process() -> None:
    there = load(seconds=3.0, first=7)
    assert Load.from_json(there.to_json()) == there
