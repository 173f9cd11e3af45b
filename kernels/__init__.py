"""Kernels: one table, op x backend -> implementation. Each op's module states its contract.

``select`` is the only place that knows which backend a model runs on; everything above calls the fields of ``Kernels``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, get_args

from headrace.kernels.formats import Format

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's implementation of every op, in the order in which a step comes by them."""

    pack_linear: Op
    pack_experts: Op
    step_inputs: Op
    embed: Op
    linear: Op
    mamba_update: Op
    mamba_prefill: Op
    decode_attention: Op
    prefill_attention: Op
    route: Op
    experts: Op
    rms_norm: Op
    sample: Op
    formats: frozenset[Format]
    """Of weights, which its ``pack_linear`` and ``pack_experts`` take."""
    together: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context whose ops may all run at its end: inside, only further ops may read what they write."""
    close: Callable[[], None] = lambda: None
    """Ends what the backend keeps, threads say; its ops may not be called afterwards."""


MODULES = {
    "pack_linear": "linear",
    "pack_experts": "moe",
    "step_inputs": "inputs",
    "embed": "linear",
    "linear": "linear",
    "mamba_update": "mamba",
    "mamba_prefill": "mamba",
    "decode_attention": "attention",
    "prefill_attention": "attention",
    "route": "moe",
    "experts": "moe",
    "rms_norm": "norm",
    "sample": "sampling",
}
"""Which module states an op's contract. A backend has a module of the same name for it."""

BACKENDS = {"reference": "headrace.kernels", "native": "headrace.kernels.native", "triton": "headrace.kernels.triton"}
"""Packages by backend; imported when selected, since not every machine has what they need."""

FORMATS: dict[str, frozenset[Format]] = {
    "reference": frozenset(get_args(Format)),
    "native": frozenset(get_args(Format)),
    "triton": frozenset(get_args(Format)),
}
"""The weight formats that a backend has kernels for."""


def select(backend: str = "reference", *, threads: int | None = None, instructions: str = "auto") -> Kernels:
    """The backend's ops. The native backend runs on ``threads`` threads (None: one per core this process may use), by
    ``instructions`` (native.library.PATHS, or "auto").

    Raises ValueError for an unknown backend, or one whose needs are not installed or not this machine's.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")

    def module(op: str) -> ModuleType:
        try:
            return import_module(f"{BACKENDS[backend]}.{MODULES[op]}")
        except ModuleNotFoundError as error:
            raise ValueError(f"backend {backend!r} needs the package {error.name!r}, which is not installed") from error

    ops = {op: getattr(module(op), op) for op in MODULES}
    if backend == "native":
        from headrace.kernels.native.library import NotBuilt, Pool, available_cores

        try:
            pool = Pool(threads or available_cores(), instructions)
        except NotBuilt as error:
            raise ValueError(f"backend 'native': {error}") from error
        ops = {name: partial(op, pool=pool) for name, op in ops.items()}
        return Kernels(**ops, formats=FORMATS[backend], together=pool.together, close=pool.close)
    return Kernels(**ops, formats=FORMATS[backend])


def native_is_built() -> bool:
    """Whether the C++ kernels were compiled when this package was installed, and can be loaded."""
    from headrace.kernels.native.library import NotBuilt, available_paths

    try:
        return bool(available_paths())
    except NotBuilt:
        return False
