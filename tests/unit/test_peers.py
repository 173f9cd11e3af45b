"""The comparison with other engines: what it reads from their tools, what it computes, and what it says of failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.peers import __main__ as comparison
from benchmarks.peers import llama_cpp, peer, summary, vllm_cpu, workload
from benchmarks.peers.peer import PeerError, PythonPeer
from benchmarks.peers.workload import Job, Row, Workload
from benchmarks.timing import Limit

WORKLOAD = Workload(vocab_size=4096)

# Both recorded from llama.cpp b11434 on the tiny checkpoint, fields that are not read left out of the first.
LLAMA_BENCH = """[
  {
    "build_commit": "unknown",
    "cpu_info": "AMD EPYC",
    "model_type": "nemotron_h_moe ?B BF16",
    "n_threads": 2,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ns": 63501793,
    "stddev_ns": 0,
    "avg_ts": 8062.764464,
    "samples_ns": [ 63501793 ],
    "samples_ts": [ 8062.76 ]
  }
]
"""
BATCHED_BENCH = """
{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 32, "pl": 1, "n_kv": 48, "t_pp": 0.001920, \
"speed_pp": 8333.333984, "t_tg": 0.026229, "speed_tg": 1220.023682, "t": 0.028149, "speed": 1705.211548}
{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 32, "pl": 1, "n_kv": 48, "t_pp": 0.001372, \
"speed_pp": 11661.807617, "t_tg": 0.021697, "speed_tg": 1474.858276, "t": 0.023069, "speed": 2080.714355}
{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 32, "pl": 8, "n_kv": 384, "t_pp": 0.018275, \
"speed_pp": 7004.104004, "t_tg": 0.171033, "speed_tg": 1496.787231, "t": 0.189308, "speed": 2028.440552}
{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 32, "pl": 32, "n_kv": 1536, "t_pp": 0.075307, \
"speed_pp": 6798.836914, "t_tg": 0.619709, "speed_tg": 1652.388428, "t": 0.695016, "speed": 2210.020996}

"""


# --- llama.cpp's tools ----------------------------------------------------------------------------------------------


def test_batched_bench() -> None:
    """Our rates are the tool's own, and its first line, the throw-away run, is not among them."""
    rows = llama_cpp.decode_rows(BATCHED_BENCH, WORKLOAD)
    assert [row["measure"] for row in rows] == ["decode B=1", "decode B=8", "decode B=32"]
    theirs = [1474.858276, 1496.787231, 1652.388428]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx(theirs, rel=1e-5)
    assert rows[0]["seconds"] == 0.021697


def test_batched_bench_that_stopped_or_did_something_else() -> None:
    lines = BATCHED_BENCH.strip().splitlines()
    for text in ("", "\n".join(lines[:-1]), "\n".join(lines[1:]), BATCHED_BENCH.replace('"tg": 32', '"tg": 16')):
        with pytest.raises(PeerError, match="llama-batched-bench ran"):
            llama_cpp.decode_rows(text, WORKLOAD)


def test_llama_bench() -> None:
    [row] = llama_cpp.prefill_rows(LLAMA_BENCH, WORKLOAD)
    assert row["measure"] == "prefill 512"
    assert row["tokens_per_s"] == pytest.approx(8062.76, rel=1e-6)
    samples = LLAMA_BENCH.replace("[ 63501793 ]", "[ 512000000, 256000000 ]")
    assert [row["tokens_per_s"] for row in llama_cpp.prefill_rows(samples, WORKLOAD)] == [1000, 2000]
    with pytest.raises(PeerError, match="llama-bench ran"):
        llama_cpp.prefill_rows(LLAMA_BENCH.replace('"n_prompt": 512', '"n_prompt": 128'), WORKLOAD)


# --- the workload ---------------------------------------------------------------------------------------------------


class Clock:
    """An engine whose time is known: a hundredth of a second for a prompt's token, a tenth for a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: int = 0, step: float = 0.1) -> None:
        self.now, self.answers, self.step = 0.0, answers, step
        self.prompts: list[tuple[int, ...]] = []
        monkeypatch.setattr(workload.time, "perf_counter", lambda: self.now)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        self.prompts += map(tuple, prompts)
        self.now += 0.01 * sum(map(len, prompts)) + self.step * new_tokens
        return [[7] * (new_tokens + self.answers) for _ in prompts]


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rows = list(workload.measure(clock.generate, WORKLOAD, seed=0))
    # Neither the prompts nor the first token counts: 32 steps of a tenth of a second.
    assert [row["seconds"] for row in rows[:3]] == pytest.approx([3.2, 3.2, 3.2])
    assert [row["tokens_per_s"] for row in rows[:3]] == pytest.approx([10, 80, 320])
    assert rows[3]["tokens_per_s"] == pytest.approx(512 / 5.22)
    assert [row.get("distinct_tokens") for row in rows] == [1, 1, 1, None]


def test_prompts_are_random_and_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(seed: int) -> list[tuple[int, ...]]:
        clock = Clock(monkeypatch)
        list(workload.measure(clock.generate, WORKLOAD, seed))
        return clock.prompts

    seen = prompts(1)
    assert seen == prompts(1)
    assert not set(seen) & set(prompts(2))
    assert len(set(seen)) == len(seen) == 1 + 2 * (1 + 8 + 32) + 1
    ids = {token for prompt in seen for token in prompt}
    assert min(ids) >= workload.FIRST_ID
    assert max(ids) < WORKLOAD.vocab_size


@pytest.mark.parametrize(("answers", "step", "words"), [(-1, 0.1, "asked for 1 x 4"), (0, 0.0, "for the first alone")])
def test_what_is_no_measurement(monkeypatch: pytest.MonkeyPatch, answers: int, step: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(workload.measure(Clock(monkeypatch, answers, step).generate, WORKLOAD, seed=0))


def test_a_job_travels_as_text() -> None:
    job = Job("folder", "bf16", 2, 3, WORKLOAD, {"backend": "native"})
    assert Job.from_json(job.to_json()) == job


# --- peers in a process of their own --------------------------------------------------------------------------------


def python_peer(**more: object) -> PythonPeer:
    return PythonPeer("headrace", ("bf16",), ("torch",), **more)  # type: ignore[arg-type]


def test_rows_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}

    def run(command: list[object], **options: object) -> str:
        said.update(options)
        Path(str(command[-1])).write_text('{"measure": "load"}\n{"measure": "decode B=1"}\n')
        raise PeerError("out of memory")

    monkeypatch.setattr(peer, "run", run)
    rows = python_peer(environment=peer.AVX2, options={"backend": "native"}).measure(Job("m", "bf16", 3, 0, WORKLOAD))
    assert [next(rows)["measure"], next(rows)["measure"]] == ["load", "decode B=1"]
    with pytest.raises(PeerError, match="out of memory"):
        next(rows)
    assert said["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    assert said["environment"]["OMP_NUM_THREADS"] == "3"
    assert Job.from_json(said["stdin"]).options == {"backend": "native"}


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="config.json"):
        list(python_peer().measure(Job(str(tmp_path), "bf16", 1, 0, WORKLOAD)))
    with pytest.raises(PeerError, match="no-such-program"):
        peer.run(["no-such-program"])
    with pytest.raises(PeerError, match="did not end within 0 s"):
        peer.run(["sleep", "5"], timeout=0.1)


def test_vllm_is_left_out_of_avx2(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot be held to avx2"):
        vllm_cpu.peer(tmp_path, "avx2").install()
    assert not list(tmp_path.iterdir())


# --- summary --------------------------------------------------------------------------------------------------------


def row(name: str, number: int, rate: float, measure: str = "decode B=1", **more: object) -> Row:
    return {
        "peer": name, "format": "bf16", "threads": 2, "round": number, "measure": measure, "tokens_per_s": rate,
        "device": "a device", "isa": "native", "commit": "abc", "version": "1", **more,
    }  # fmt: skip


ROWS = [
    *(row("headrace", number, rate) for number, rate in enumerate((20.0, 10.0, 40.0))),
    *(row("headrace", number, 9.0, threads=1) for number in range(3)),
    # Slow in the round in which we were slow too: the ratio of the medians would be 1.
    *(row("llama.cpp", number, rate, weight_bytes_per_token=10**9) for number, rate in enumerate((20.0, 5.0, 32.0))),
    row("vllm", 7, 3.0, note="torch-loop experts"),
    {"measure": "bandwidth", "threads": 2, "bytes_per_s": 40e9},
    {"measure": "none", "peer": "transformers", "error": "no room"},
]


def test_ratios_are_of_the_same_round() -> None:
    table = summary.series(ROWS)
    assert summary.our_labels(table) == ["headrace bf16, 2 threads"]
    ours, theirs = (table[f"{name} bf16, 2 threads"]["decode B=1"] for name in ("headrace", "llama.cpp"))
    assert summary.ratio(ours, theirs) == 1.25
    assert summary.ratio(ours, {0: 10.0, 9: 1.0}) == 2
    assert summary.ratio(ours, {9: 1.0}) is None


def test_rows_of_one_round_are_one_figure() -> None:
    rows = [row("a", 0, rate) for rate in (1.0, 2.0, 9.0)]
    assert summary.series(rows) == {"a bf16, 2 threads": {"decode B=1": {0: 2.0}}}


def test_the_table() -> None:
    text = summary.markdown(ROWS)
    assert "| headrace bf16, 2 threads | 20.0 (10.0 - 40.0) |" in text
    assert "| headrace bf16, 1 thread | 9.0 (9.0 - 9.0) |" in text
    assert "headrace bf16, 2 threads, as a multiple of:" in text
    assert "| llama.cpp bf16, 2 threads | 1.25x |" in text
    assert "| vllm bf16, 2 threads (torch-loop experts) | - |" in text  # no round in common
    assert "- llama.cpp bf16, 2 threads: 20.0 GB/s, 50% of the read bandwidth" in text
    assert "- transformers: no room" in text


def test_a_table_of_nothing() -> None:
    text = summary.markdown([{"measure": "none", "peer": "vllm", "error": "no room"}])
    assert "- vllm: no room" in text
    assert "as a multiple" not in text


def test_loading() -> None:
    base = {"peer": "headrace", "format": "bf16", "threads": 2}
    rows = [
        *({**base, "measure": "load", "seconds": s, "read_seconds": 1.0, "bytes": 10**9} for s in (3.0, 2.0, 9.0)),
        *({**base, "measure": "memory", "loading_bytes": 2 * 10**9, "serving_bytes": b} for b in (10**9, 15 * 10**8)),
    ]
    [line] = summary.loading(rows)
    assert "3.00 s, 3.0 times" in line
    assert "serving 1.50 GB (1.50 of" in line


def test_the_picture(tmp_path: Path) -> None:
    summary.plot(ROWS, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        summary.plot([], tmp_path / "p.png")


# --- taking turns ---------------------------------------------------------------------------------------------------


@dataclass
class FakePeer:
    """Says when it is asked; can be one that does not install, or one that fails after its first row."""

    name: str
    asked: list[str]
    formats: tuple[str, ...] = ("bf16",)
    broken: str = ""
    jobs: list[Job] = field(default_factory=list)

    def install(self) -> str:
        if self.broken == "install":
            raise PeerError("no compiler")
        return "1.0"

    def prepare(self, checkpoint: Path, format: str) -> Path:
        assert (checkpoint / "config.json").exists()
        return checkpoint

    def measure(self, job: Job) -> Iterator[Row]:
        self.asked.append(f"{self.name} {job.threads}")
        self.jobs.append(job)
        yield workload.decode_row(job.workload, 1, 2.0)
        if self.broken == "measure":
            raise PeerError("out of memory")


def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, **broken: str) -> SimpleNamespace:
    asked: list[str] = []
    peers = {name: FakePeer(name, asked, broken=broken.get(name, "")) for name in ("headrace", "vllm")}
    peers["transformers"] = FakePeer("transformers", asked, formats=("f32",))
    monkeypatch.setattr(comparison, "all_peers", lambda cache, isa, backend: peers)
    monkeypatch.setattr(comparison.timing, "measure", lambda device: [Limit("cpu", 2, 1e10, "sum", 1.0, "GEMM")])
    app = typer.Typer()
    app.command()(comparison.main)
    file = tmp_path / "rows.jsonl"
    options = ["--cache", str(tmp_path / "cache"), "--out", str(file), "--model", "tiny", "--threads", "2"]
    result = CliRunner().invoke(app, [*options, *arguments])
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return SimpleNamespace(result=result, rows=rows, asked=asked, peers=peers, file=file)


def test_turns_are_interleaved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = compare(monkeypatch, tmp_path, "--peers", "headrace,vllm", "--formats", "bf16", "--rounds", "2")
    assert done.result.exit_code == 0, done.result.output
    assert done.asked == ["headrace 1", "headrace 2", "vllm 2", "vllm 2", "headrace 2", "headrace 1"]
    assert sum(row["measure"] == "bandwidth" for row in done.rows) == 3
    assert {job.seed for job in done.peers["vllm"].jobs} == {0, 1}
    assert done.peers["vllm"].jobs[0].workload.vocab_size == 4096
    assert "| vllm bf16, 2 threads | 16.0 (16.0 - 16.0) |" in done.file.with_suffix(".md").read_text()
    assert done.file.with_suffix(".png").stat().st_size > 1000


def test_a_peer_that_fails_is_named_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--peers", "vllm,transformers,headrace", "--formats", "bf16", "--rounds", "1")
    done = compare(monkeypatch, tmp_path, *arguments, vllm="install", headrace="measure")
    assert done.result.exit_code == 0, done.result.output
    text = done.file.with_suffix(".md").read_text()
    for words in ("- vllm: no compiler", "- transformers: keeps weights in f32 only", "- headrace: out of memory"):
        assert words in text
    assert "| headrace bf16, 2 threads | 16.0" in text  # what it had said before


def test_no_rounds_only_prepares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = compare(monkeypatch, tmp_path, "--peers", "headrace", "--rounds", "0")
    assert done.result.exit_code == 0, done.result.output
    assert done.asked == []
    assert (tmp_path / "cache" / "checkpoints" / "tiny" / "config.json").exists()


@pytest.mark.parametrize(("option", "value"), [
    ("--peers", "llama"), ("--peers", ""), ("--formats", "bf16,int3"), ("--isa", "sse"), ("--model", "super"),
    ("--threads", "0"), ("--rounds", "-1"),
])  # fmt: skip
def test_options_that_mean_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, value: str) -> None:
    done = compare(monkeypatch, tmp_path, option, value)
    assert done.result.exit_code == 2
    assert option in done.result.output
    assert not done.file.exists()
