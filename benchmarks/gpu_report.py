"""What only a GPU can tell, in one command: ``python -m benchmarks.gpu_report``.

Compares the ops of a step with their references, times them with a cold L2 against the copy bandwidth measured in the
same run, runs the engine, and writes a report with the device's name and the commit; the exit status says if an op is
wrong. ``--device cpu`` goes the same way with the
references at an eighth of the sizes: good for trying the report itself.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.conftest import ROOT, device_name
from benchmarks.ops import DECODE, EIGHTH, PROMPT, SUPER, Bench, Work, decode_attention
from headrace.engine import Engine, EngineConfig, SamplingParams
from headrace.kernels import select

BATCHES = (1, 8, 32, 128)
PROMPTS = (256, 2048)
FLUSH_BYTES = 1 << 29
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest error that rounding explains: prompts scan in pairs of bf16, bf16 weights round their activations too."""


@dataclass(frozen=True, slots=True)
class Timer:
    """Median seconds of a call, everything it needs out of L2 before each."""

    device: torch.device
    rounds: int
    flush: Tensor  # larger than any L2; reading it leaves no line that has still to be written back

    def __call__(self, run: Callable[[], object]) -> float:
        run()  # compiles
        return statistics.median(self._once(run) for _ in range(self.rounds))

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self.flush.sum()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # the launches queue up behind it, so that the host's time is not counted
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second, read and written, of a large copy."""
    size = 1 << (30 if timer.device.type == "cuda" else 27)
    source = torch.ones(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / timer(lambda: target.copy_(source))


def outputs(work: Work) -> list[Tensor]:
    out = work.run()
    parts = out if isinstance(out, tuple) else (out,)
    return [t.detach().cpu().double() for t in (*parts, *work.advanced)]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference relative to the root mean square of what it should be; NaN where there is one.

    Raises ValueError if shapes differ.
    """
    worst = [0.0]
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        if e.numel():
            scale = e.square().mean().sqrt().clamp(min=1e-30)
            worst.append(float((a - e).abs().max() / scale))
    return float(torch.tensor(worst).max())  # torch's max hands a NaN on, Python's does not


def compared(device: torch.device, backend: str) -> Iterator[tuple[str, ...]]:
    """Each op at an eighth of the sizes, fp32 and bf16 weights, beside its reference."""
    for dtype in (torch.float32, torch.bfloat16):
        ours = Bench(select(backend), device, dtype, EIGHTH)
        theirs = Bench(select("reference"), torch.device("cpu"), dtype, EIGHTH)
        for group, ops, rows in (("decode", DECODE, 7), ("prompt", PROMPT, 300)):
            for name, make in ops.items():
                try:
                    worst = error(outputs(make(ours, rows)), outputs(make(theirs, rows)))
                    found = f"{worst:.1e}", "ok" if worst <= LIMITS[dtype] else "WRONG"
                except Exception as failure:  # the other rows are worth having
                    found = f"{type(failure).__name__}: {failure}".replace("\n", " ")[:120], "FAILED"
                yield group, name, str(dtype).removeprefix("torch."), *found


def timed(bench: Bench, timer: Timer, bandwidth: float) -> Iterator[tuple[str, ...]]:
    """Each op at full size: time, rate of the bytes that must move, share of the copy bandwidth."""
    gpu = timer.device.type == "cuda"
    long = {"decode_attention 32k": lambda b, rows: decode_attention(b, rows, 32768)} if gpu else {}
    batches, prompts = (BATCHES, PROMPTS) if gpu else (BATCHES[:2], PROMPTS[:1])
    for group, ops, sizes in (("decode", DECODE | long, batches), ("prompt", PROMPT, prompts)):
        for name, make in ops.items():
            for rows in sizes:
                try:
                    work = make(bench, rows)
                    seconds = timer(work.run)
                    rate = work.minimum_bytes / seconds
                    found = f"{seconds * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.2f}"
                except Exception as failure:
                    found = f"{type(failure).__name__}: {failure}".replace("\n", " ")[:120], "", ""
                yield group, name, str(rows), *found
                work = None  # its memory goes before the next one's comes


def engine_runs(config: EngineConfig) -> Iterator[tuple[str, ...]]:
    """The embedded model answering: tokens per second, and whether every answer is what it is alone."""
    with Engine(config=config) as engine:
        params = [SamplingParams(temperature=1.0, seed=i, max_tokens=64, ignore_eos=True) for i in range(128)]
        prompts = [engine.prompt_ids([{"role": "user", "content": f"{i} + {3 * i}"}]).ids for i in range(128)]

        def together(count: int) -> tuple[list[tuple[int, ...]], float]:
            start = time.perf_counter()
            streams = [engine.generate_stream(prompts[i], params[i]) for i in range(count)]
            tokens = [tuple(t for e in stream for t in getattr(e, "token_ids", ())) for stream in streams]
            return tokens, count * 64 / (time.perf_counter() - start)

        together(2)
        alone = [together_one(engine, prompts[i], params[i]) for i in range(4)]
        for count in (1, 32, 128):
            tokens, speed = together(count)
            same = sum(a == b for a, b in zip(alone, tokens, strict=False))
            yield str(count), f"{speed:.0f}", f"{same} of {min(4, count)}"


def together_one(engine: Engine, prompt: Any, params: SamplingParams) -> tuple[int, ...]:
    """One request with nothing beside it."""
    return tuple(t for event in engine.generate_stream(prompt, params) for t in getattr(event, "token_ids", ()))


def markdown(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table, written as it is computed so that a long run shows where it is."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def report(device: torch.device, backend: str) -> Iterator[str]:
    """The report's sections as markdown, as they are done."""
    gpu = device.type == "cuda"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    timer = Timer(device, 20 if gpu else 3, torch.ones(FLUSH_BYTES if gpu else 1, dtype=torch.uint8, device=device))
    bench = Bench(select(backend), device, torch.bfloat16 if gpu else torch.float32, SUPER if gpu else EIGHTH)
    bandwidth = copy_bandwidth(timer)
    yield (
        f"# {device_name(device.type)}, backend {backend}\n\nCommit {commit}, {time.strftime('%Y-%m-%d')}, torch "
        f"{torch.__version__}, triton {triton_version()}. Copy bandwidth measured: {bandwidth / 1e9:.0f} GB/s. All "
        "figures below are measured."
    )
    yield (
        "## Against the references\n\nLargest difference over the root mean square, at an eighth of the sizes.\n\n"
        + (markdown(("group", "op", "weights", "error", ""), compared(device, backend)))
    )
    sizes = "Super's sizes" if gpu else "An eighth of Super's sizes"
    yield f"## Times\n\n{sizes}, cold L2, medians of {timer.rounds}.\n\n" + markdown(
        ("group", "op", "rows", "us", "GB/s", "of copy"), timed(bench, timer, bandwidth)
    )
    yield "## Engine\n\nThe embedded model, 64 tokens a request, temperature 1; beside the same requests alone.\n\n" + (
        markdown(("requests", "tok/s", "same tokens"), engine_runs(EngineConfig(device=str(device), max_sequences=128)))
    )


def triton_version() -> str:
    try:
        import triton

        return str(triton.__version__)
    except ImportError:
        return "none"


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu for a trial run.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Where the report goes.", show_default="benchmarks/results")] = None,
) -> None:
    """Write the report."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter("torch sees no CUDA device; --device cpu tries the report with the references")
        torch.cuda.set_device(chosen)
    name = "".join(c if c.isalnum() else "-" for c in device_name(chosen.type).lower()).strip("-")
    path = out or ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{name}.md"
    sections: list[str] = []
    for section in report(chosen, "triton" if chosen.type == "cuda" else "reference"):
        sections.append(section)
        path.write_text("\n\n".join(sections) + "\n")  # what is known so far, should the next section not end well
    print(f"wrote {path}")
    if any("WRONG" in section or "FAILED" in section for section in sections):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
