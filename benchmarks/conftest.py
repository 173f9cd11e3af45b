"""Every benchmark leaves a row: median, spread, device, commit, configuration, as one JSON line.

``pytest benchmarks --benchmark-enable`` writes them to benchmarks/results/latest.jsonl (``--rows FILE`` for another),
below a header with what the machine can do at most. In the test suite the same functions run once each, untimed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.rows import ROOT, Rows


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", default=str(ROOT / "benchmarks" / "results" / "latest.jsonl"), help="where rows go")
    parser.addoption("--sizes", help="of the kernels: full (a GPU's default) or eighth (a CPU's)")


@pytest.fixture(scope="session")
def rows_file(request: pytest.FixtureRequest) -> Rows:
    """This run's file."""
    return Rows(Path(request.config.getoption("--rows")), torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest, benchmark: Any, rows_file: Rows) -> Any:
    """Writes the test's row when it was timed."""
    yield
    if benchmark.stats is not None:
        rows_file.add(request.node.name, benchmark.group, benchmark.stats.stats.data, benchmark.extra_info)
