"""One turn of a peer, in its own process and environment: ``PYTHON -m benchmarks.peers.worker PEER ROWS < JOB``.

Rows are appended as they are measured: besides the workload's, the time to load against the time to read the same
files once, and the largest resident set while loading and while serving. The standard library only.
"""

from __future__ import annotations

import importlib
import json
import mmap
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.peers.workload import Generate, Job, Row, measure

OPENERS = {
    "headrace": "benchmarks.peers.headrace",
    "headrace-bf16": "benchmarks.peers.headrace",
    "transformers": "benchmarks.peers.hugging_face",
    "vllm": "benchmarks.peers.vllm_cpu",
}
"""Peer -> the module whose ``opened(job)`` is a context manager that gives a Generate."""


def read_once(folder: Path) -> tuple[int, float]:
    """Bytes of the weights' files, and the seconds to read them into new memory: the least that a loader does."""
    held, start = [], time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            memory = mmap.mmap(-1, path.stat().st_size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            view, done = memoryview(memory), 0
            while count := file.readinto(view[done:]):  # one call reads at most 2 GiB
                done += count
            held.append(memory)
    return sum(map(len, held)), time.perf_counter() - start


def peak_resident() -> int:
    """The largest resident set since the process began, or since ``forget_peak``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Begin the peak anew (Linux, proc(5): clear_refs 5)."""
    Path("/proc/self/clear_refs").write_text("5")


def run(peer: str, job: Job, out: Path) -> None:
    """Measure and append the rows to ``out``."""

    def write(row: Row) -> None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    module = importlib.import_module(OPENERS[peer])
    module.imports()  # the time to import a library is not the time to load a model
    read_once(Path(job.model))  # into the page cache, for both
    size, read_seconds = read_once(Path(job.model))
    forget_peak()
    start = time.perf_counter()
    opened: AbstractContextManager[Generate] = module.opened(job)
    with opened as generate:
        seconds = time.perf_counter() - start
        loading = peak_resident()
        write({"measure": "load", "seconds": seconds, "read_seconds": read_seconds, "bytes": size})
        forget_peak()
        for row in measure(generate, job.workload, job.seed):
            write(row)
        write({"measure": "memory", "loading_bytes": loading, "serving_bytes": peak_resident(), "bytes": size})


if __name__ == "__main__":
    run(sys.argv[1], Job.from_json(sys.stdin.read()), Path(sys.argv[2]))
