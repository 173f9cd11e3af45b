"""Every kernel test runs on every backend of the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from headrace.kernels import TABLE, Kernels, select

BACKENDS = sorted({backend for implementations in TABLE.values() for backend in implementations})


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return select(request.param)
