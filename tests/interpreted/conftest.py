"""Kernels run by Triton's interpreter, every launch sanitized.

A process interprets or compiles, so these tests are collected only where ``TRITON_INTERPRET=1`` was set before pytest
started; tests/unit/test_interpreted_suite.py starts such a pytest for each file.
"""

import os
import zlib
from collections.abc import Iterator

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    from headrace.kernels.lab import interpreter, sanitizer

    interpreter.install()

    @pytest.fixture(autouse=True)
    def sanitized(request: pytest.FixtureRequest) -> Iterator[None]:
        """Bounds, races and undefined lanes, in an order of programs that each test draws for itself (costs 1.2x)."""
        with sanitizer.sanitize(order="shuffle", seed=zlib.crc32(request.node.nodeid.encode())):
            yield
