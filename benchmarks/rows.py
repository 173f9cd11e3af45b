"""Rows of measurements as JSON lines: a run's header with its machine and its limits, then one line a benchmark."""

from __future__ import annotations

import json
import platform
import secrets
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Limit, measure

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The checkout's commit, "-dirty" behind it if files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def device_name(kind: str = "cuda") -> str:
    """The accelerator if there is one and ``kind`` is not "cpu", else the processor."""
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


class Rows:
    """Appends one run's rows to a file, behind a header that is measured when it is first needed."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device

    @cached_property
    def limits(self) -> list[Limit]:
        """Of the CPU and then, if it is another, of the device."""
        return [limit for kind in dict.fromkeys(("cpu", self.device.type)) for limit in measure(torch.device(kind))]

    @cached_property
    def machine(self) -> dict[str, Any]:
        """What the rows belong to; written, with the limits, as the header."""
        machine = {
            "run": secrets.token_hex(4),
            "device": device_name(self.device.type),
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._write({"limits": [asdict(limit) for limit in self.limits], **machine})
        return machine

    def add(self, name: str, group: str | None, seconds: Sequence[float], config: dict[str, Any]) -> None:
        """One benchmark's row: median and quartiles of its rounds, in seconds."""
        machine = self.machine
        low, median, high = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
        measured = {"median_s": median, "q1_s": low, "q3_s": high, "rounds": len(seconds)}
        self._write({"name": name, "group": group, **measured, "config": config, **machine})

    def _write(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
