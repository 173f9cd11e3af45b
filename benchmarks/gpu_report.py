"""What only a GPU can tell, in one command: ``python -m benchmarks.gpu_report``.

Compares every op with its reference at the published models' sizes, times it with a cold L2 against the limits measured
in the same run, runs the engine, and writes a report with the device's name and the commit, and its rows beside it as
JSON lines. The exit status says if anything is wrong. It is about every backend that works on the device, about the
references only where there is no other. ``--device cpu`` goes the same way at an eighth of the sizes: good for trying
the report itself.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import compare, engine_runs
from benchmarks.cases import CASES, backends
from benchmarks.ops import EIGHTH, FULL, Sizes
from benchmarks.rows import ROOT, Rows, commit, device_name
from benchmarks.timing import Limit, Timer
from headrace.engine import Engine, EngineConfig
from headrace.kernels import select


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report is about."""

    device: torch.device
    backend: Any  # of engine.options.Backend
    sizes: Sizes
    timer: Timer
    limit: Limit
    tokens: int  # of an answer


def compared(subject: Subject) -> Iterator[tuple[str, ...]]:
    """One line per op and dtype: the worst over all numbers of rows."""
    kernels, reference = select(subject.backend), select("reference")
    for found in compare.compare(kernels, reference, CASES, subject.device, subject.sizes):
        case, rows = found.case, {None: "-", True: "same", False: "DIFFERENT"}[found.same_rows]
        error = found.failure or f"{found.error:.1e}"
        yield case.group, case.name, case.dtype, error, str(found.rows), f"{found.limit:.1e}", rows, found.word
        _make_room()


def timed(subject: Subject, rows_file: Rows) -> Iterator[tuple[str, ...]]:
    """Each op: time, rate of the bytes that must move and of the flops, the limits' time over its own."""
    kernels = select(subject.backend)
    for case in CASES:
        for rows in case.rows(subject.sizes) if case.format in kernels.formats else ():
            try:
                work = case.build(kernels, subject.device, subject.sizes, rows)
                seconds = subject.timer(work.run)
            except Exception as failure:  # the other rows are worth having
                yield case.group, case.name, str(rows), _short(failure), "", "", "FAILED"
                continue
            config = {
                "op": case.name, "rows": rows, "backend": subject.backend, "on": subject.device.type,
                "sizes": subject.sizes.name, "dtype": case.dtype, "minimum_bytes": work.minimum_bytes,
                "flops": work.flops,
            }  # fmt: skip
            rows_file.add(f"{case.group}[{subject.backend}-{case.name}-{rows}]", case.group, seconds, config)
            median = seconds[len(seconds) // 2]
            rates = f"{work.minimum_bytes / median / 1e9:.0f}", f"{work.flops / median / 1e9:.0f}"
            share = subject.limit.seconds(work.minimum_bytes, work.flops) / median
            yield case.group, case.name, str(rows), f"{median * 1e6:.1f}", *rates, f"{share:.2f}"
            del work
            _make_room()


def _make_room() -> None:
    """One op's memory goes before the next one's comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".replace("\n", " ")[:160]


def engine_sections(subject: Subject) -> Iterator[str]:
    """The embedded model and a slice of Super at work."""
    config = EngineConfig(
        device=str(subject.device), backend=subject.backend, max_sequences=engine_runs.BATCHES[-1], max_context=512
    )
    times = engine_runs.OpTimes(subject.device)
    layers = f"layers {engine_runs.LAYERS} of Super, {subject.sizes.name} widths, random weights"
    models: dict[str, Callable[[], Engine]] = {
        "the embedded model": partial(Engine, config=config),
        layers: partial(engine_runs.slice_of_super, subject.sizes.super, config, times),
    }
    header = ("requests", "tok/s", "ms a decode step", "same tokens as alone")
    for name, start in models.items():
        text = f"## {subject.backend}, engine: {name}\n\n{subject.tokens} tokens a request, temperature 1.\n\n"
        try:
            with start() as engine:
                load = engine_runs.Load(engine, subject.tokens)
                text += markdown(header, engine_runs.speeds(load, times))
                if name == layers:
                    text += (
                        "\n\nThe ops of its decode steps: medians of the time until a call returns and of the time "
                        "between two events around it, which waits for the host where that is slower.\n\n"
                    )
                    columns = ("requests", "op", "calls a step", "us a call, host", "us a call, device")
                    text += markdown(columns, engine_runs.op_times(load, times))
        except Exception as failure:  # what is known is worth having
            text += f"\n\nFAILED: {_short(failure)}"
        yield text
        _make_room()


def markdown(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table, written as it is computed so that a long run shows where it is."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def sections(subject: Subject, rows_file: Rows) -> Iterator[str]:
    """One backend's part of the report as markdown, as it is done."""
    sizes = subject.sizes.name
    columns: tuple[str, ...] = ("group", "op", "dtypes", "error", "at rows", "limit", "rows in batches", "")
    yield (
        f"## {subject.backend} against the references\n\nSizes: {sizes}. The largest difference, relative to the value "
        "or to the root mean square; nan where there is one, inf where integers differ. Rows in batches: whether a "
        "row's bits are the same in all.\n\n" + markdown(columns, compared(subject))
    )
    columns = ("group", "op", "rows", "us", "GB/s", "GFLOP/s", "of limits")
    yield (
        f"## {subject.backend}, times\n\nSizes: {sizes}. Cold L2 on a GPU, medians of {subject.timer.rounds}; of bytes "
        "and flops those that cannot be avoided.\n\n" + markdown(columns, timed(subject, rows_file))
    )
    yield from engine_sections(subject)


def title(device: torch.device, limit: Limit) -> str:
    """What the report is about and what its times are compared with."""
    return (
        f"# {device_name(device.type)}\n\nCommit {commit()}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
        f"triton {triton_version()}. All figures below are measured. Limits: {limit.bytes_per_s / 1e9:.0f} GB/s "
        f"({limit.bytes_by}), {limit.flops_per_s / 1e9:.0f} GFLOP/s ({limit.flops_by})."
    )


def report(device: torch.device, rows_file: Rows) -> Iterator[str]:
    """The sections, as they are done."""
    gpu = device.type == "cuda"
    yield title(device, limit := rows_file.limits[-1])
    found = backends(device)
    for backend in [name for name in found if name != "reference"] or found:
        timer = Timer.on(device, 20 if gpu else 3)
        yield from sections(
            Subject(device, backend, FULL if gpu else EIGHTH, timer, limit, tokens=64 if gpu else 8), rows_file
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
            raise typer.BadParameter("torch sees no CUDA device; --device cpu tries the report there")
        torch.cuda.set_device(chosen)
    name = "".join(c if c.isalnum() else "-" for c in device_name(chosen.type).lower()).strip("-")
    path = out or ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{name}.md"
    written: list[str] = []
    for section in report(chosen, Rows(path.with_suffix(".jsonl"), chosen)):
        written.append(section)
        path.write_text("\n\n".join(written) + "\n")  # what is known so far, should the next section not end well
    print(f"wrote {path}")
    if any(word in section for section in written for word in ("WRONG", "FAILED")):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
