"""Every kernel test runs on the references, on each instruction path of the native kernels, and on Triton's.

With TRITON_INTERPRET=1 the same tests run the Triton kernels in the repaired interpreter instead; where there is a GPU
they also run there (``pytest -m gpu``), with every tensor of the test on it.
"""

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from headrace.kernels import BACKENDS, FORMATS, MODULES
from headrace.kernels.formats import format_of
from headrace.kernels.native.library import EXACT_PATHS, NotBuilt, Pool, available_paths

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from headrace.kernels.lab import interpreter, sanitizer

    interpreter.install()

    @pytest.fixture(autouse=True)
    def sanitized(request: pytest.FixtureRequest) -> Iterator[None]:
        """Bounds, races and undefined lanes, in a program order of the test's own."""
        with sanitizer.sanitize(seed=zlib.crc32(request.node.nodeid.encode())):
            yield


def native_paths() -> list[str]:
    """Instruction paths of this machine; none where the native kernels were not built."""
    try:
        return [f"native-{path}" for path in available_paths() if path in EXACT_PATHS]
    except NotBuilt:
        return []


WAYS = ["triton"] if INTERPRETED else ["reference", *native_paths()]
if torch.cuda.is_available() and not INTERPRETED:
    WAYS.append(pytest.param("gpu", marks=pytest.mark.gpu))


@cache
def pool_of(threads: int, path: str) -> Pool:
    return Pool(threads, path)


class Ops:
    """One backend's ops, each imported when it is asked for. Native ones run on as many threads as torch does."""

    def __init__(self, way: str) -> None:
        self.backend, _, self.path = way.partition("-")

    def __getattr__(self, op: str) -> object:
        if op not in MODULES:
            raise AttributeError(op)
        function = getattr(import_module(f"{BACKENDS[self.backend]}.{MODULES[op]}"), op)
        if op.startswith("pack"):
            function = self.known_formats(function)
        if not self.path:
            return function
        return lambda *args, **options: function(*args, **options, pool=pool_of(torch.get_num_threads(), self.path))

    def known_formats(self, pack: Callable[..., object]) -> Callable[..., object]:
        """Skips a test whose weights this backend has no kernels for."""

        def packed(*weights: object, **options: object) -> object:
            given = weights[0] if isinstance(weights[0], list) else weights
            if missing := {format_of(weight) for weight in given} - FORMATS[self.backend]:
                pytest.skip(f"no {self.backend} kernels for {', '.join(missing)} weights")
            return pack(*weights, **options)

        return packed


@pytest.fixture(params=WAYS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param != "gpu":
        yield Ops(request.param)
        return
    torch.set_default_device("cuda")
    yield Ops("triton")
    torch.set_default_device(None)
