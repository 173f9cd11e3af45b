"""Kernels: one table, op x backend -> implementation. Each op's module states its contract.

``select`` is the only place that knows which backend a model runs on; everything above calls the fields of ``Kernels``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any

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

BACKENDS = {"reference": "headrace.kernels", "triton": "headrace.kernels.triton"}
"""Packages by backend; imported when selected, since not every machine has what they need."""


def select(backend: str = "reference") -> Kernels:
    """The backend's ops. Raises ValueError for an unknown backend, or one whose needs are not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")

    def module(op: str) -> ModuleType:
        try:
            return import_module(f"{BACKENDS[backend]}.{MODULES[op]}")
        except ModuleNotFoundError as error:
            raise ValueError(f"backend {backend!r} needs the package {error.name!r}, which is not installed") from error

    return Kernels(**{field.name: getattr(module(field.name), field.name) for field in fields(Kernels)})
