"""Every kernel test runs on the references, and as many more times as there are ways to run the Triton kernels.

With TRITON_INTERPRET=1 the same tests run the Triton kernels in the repaired interpreter instead; where there is a GPU
they also run there (``pytest -m gpu``), with every tensor of the test on it.
"""

import os
import sys
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from headrace.kernels import BACKENDS, MODULES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from headrace.kernels.lab import interpreter, sanitizer

    interpreter.install()

    @pytest.fixture(autouse=True)
    def sanitized(request: pytest.FixtureRequest) -> Iterator[None]:
        """Bounds, races and undefined lanes, in a program order of the test's own."""
        with sanitizer.sanitize(seed=zlib.crc32(request.node.nodeid.encode())):
            yield


WAYS = ["triton"] if INTERPRETED else ["reference"]
if torch.cuda.is_available() and not INTERPRETED:
    WAYS.append(pytest.param("gpu", marks=pytest.mark.gpu))


class Ops:
    """One backend's ops, each imported when it is asked for."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, op: str) -> object:
        if op not in MODULES:
            raise AttributeError(op)
        return getattr(import_module(f"{BACKENDS[self.backend]}.{MODULES[op]}"), op)


@pytest.fixture(params=WAYS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param != "gpu":
        yield Ops(request.param)
        return
    torch.set_default_device("cuda")
    yield Ops("triton")
    torch.set_default_device(None)
