"""Kernels: one table, op x backend -> implementation. Each op's module states its contract.

``select`` is the only place that knows which backend a model runs on; everything above calls the fields of ``Kernels``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from headrace.kernels import activation, attention, linear, mamba, moe, norm, sampling

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's implementation of every op."""

    pack_linear: Op
    linear: Op
    rms_norm: Op
    gated_rms_norm: Op
    relu2: Op
    route: Op
    experts: Op
    append: Op
    decode_attention: Op
    prefill_attention: Op
    conv_update: Op
    conv_prefill: Op
    ssm_update: Op
    ssm_prefill: Op
    sample: Op


TABLE: Mapping[str, Mapping[str, Op]] = MappingProxyType(
    {
        "pack_linear": {"reference": linear.pack_linear},
        "linear": {"reference": linear.linear},
        "rms_norm": {"reference": norm.rms_norm},
        "gated_rms_norm": {"reference": norm.gated_rms_norm},
        "relu2": {"reference": activation.relu2},
        "route": {"reference": moe.route},
        "experts": {"reference": moe.experts},
        "append": {"reference": attention.append},
        "decode_attention": {"reference": attention.decode_attention},
        "prefill_attention": {"reference": attention.prefill_attention},
        "conv_update": {"reference": mamba.conv_update},
        "conv_prefill": {"reference": mamba.conv_prefill},
        "ssm_update": {"reference": mamba.ssm_update},
        "ssm_prefill": {"reference": mamba.ssm_prefill},
        "sample": {"reference": sampling.sample},
    }
)


def select(backend: str = "reference") -> Kernels:
    """The backend's ops. Raises ValueError for a backend that lacks one."""
    missing = [op for op, implementations in TABLE.items() if backend not in implementations]
    if missing:
        raise ValueError(f"backend {backend!r} has no implementation of {', '.join(missing)}")
    return Kernels(**{field.name: TABLE[field.name][backend] for field in fields(Kernels)})
