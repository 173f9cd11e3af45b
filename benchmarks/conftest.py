"""Every benchmark leaves a row: median, spread, device, commit, configuration, as one JSON line.

``pytest benchmarks --benchmark-enable`` writes them to benchmarks/results/latest.jsonl (``--rows FILE`` for another).
In the test suite the same functions run once each, untimed.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", default=str(ROOT / "benchmarks" / "results" / "latest.jsonl"), help="where rows go")


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """What the timings of this run belong to."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(kind: str = "cuda") -> str:
    """The accelerator if there is one and ``kind`` is not "cpu", else the processor."""
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest, benchmark: Any, machine: dict[str, Any]) -> Any:
    """Writes the test's row when it was timed."""
    yield
    if benchmark.stats is None:
        return
    stats = benchmark.stats.stats
    entry = {
        "name": request.node.name,
        "group": benchmark.group,
        "median_s": stats.median,
        "q1_s": stats.q1,
        "q3_s": stats.q3,
        "rounds": stats.rounds,
        "config": benchmark.extra_info,
        **machine,
    }
    path = Path(request.config.getoption("--rows"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
