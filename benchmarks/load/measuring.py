"""One load on one server, measured; and the file that rows go to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import rows as machine_rows
from benchmarks.load.client import Client
from benchmarks.load.drive import drive
from benchmarks.load.processes import Memory, Server, load_average
from benchmarks.load.samples import figures
from benchmarks.load.workload import Load, Row

SETTLED = 0.2
"""Share of a run after which a server's memory should have settled: what it grows by later is its slope."""


def over_http(server: Server, load: Load, key: str | None = None) -> Row:
    """A row's figures, the CPU time of both sides, and the server's memory where the server is ours."""
    return asyncio.run(_over_http(server, load, key))


async def _over_http(server: Server, load: Load, key: str | None) -> Row:
    client, memory = Client(server.url, load.workload, key), Memory(server.process)
    served = server.process.cpu_seconds() if server.process else None
    asked = time.process_time()
    try:
        async with memory:
            samples, seconds = await drive(client, load)
    finally:
        await client.close()
    cpu = {"client": time.process_time() - asked}
    if server.process is not None and served is not None:
        cpu["server"] = server.process.cpu_seconds() - served
    return {**figures(samples, seconds), "cpu_s": cpu, **memory_figures(memory.curve())}


def memory_figures(curve: Sequence[tuple[float, int]]) -> Row:
    """Of a curve of (seconds, bytes): its peak, and the slope of the line through what comes behind SETTLED of it."""
    if not curve:
        return {}
    settled = np.array([point for point in curve if point[0] >= SETTLED * curve[-1][0]], dtype=float)
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) if len(settled) > 2 else 0.0
    return {
        "memory": [[round(seconds, 1), size] for seconds, size in curve],
        "memory_peak_bytes": max(size for _, size in curve),
        "memory_bytes_per_minute": 60 * slope,
    }


class Record:
    """Appends rows to a file (JSON lines), each with its machine, and keeps them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = []
        self._machine = {"device": machine_rows.device_name("cpu"), "commit": machine_rows.commit()}

    def add(self, row: Row) -> Row:
        """One row, said on stdout too."""
        now = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load_average": load_average()}
        row = {**row, **self._machine, **now}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(told(row), flush=True)
        return row


def told(row: Row) -> str:
    """A row for the one who waits."""
    parts = [f"{row['scenario']}, {row['measure']}: {row['answered']} of {row['requests']} answered"]
    parts.append(f"{row['tokens_per_s']:.0f} tokens/s")
    parts += [f"{name} p50 {row[f'{name}_s']['p50']:.3g} s" for name in ("ttft", "e2e") if row[f"{name}_s"]]
    if row["errors"]:
        parts.append(f"errors {row['errors']}")
    return ", ".join([*parts, f"load average {row['load_average'][0]}"])
