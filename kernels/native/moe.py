"""Routed experts; see ``kernels/moe.py`` for the contracts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.formats import common_format
from headrace.kernels.moe import Matrices, Routes, Routing
from headrace.kernels.native.library import Op, Pool
from headrace.kernels.native.linear import Panels, scale_of

ROUTE = Op("route", "qqqqqqqqqdqq")
EXPERTS = Op("experts", "qqqqqqqqqqqqqqqqqqq")


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts as the kernel wants them."""

    up: Panels  # [E, ...]
    down: Panels
    up_scale: Tensor | None  # [E] fp32
    down_scale: Tensor | None
    inner: int


def pack_experts(up: Matrices, down: Matrices, *, pool: Pool) -> PackedExperts:
    """As the reference's; floats in the wider dtype of the two."""
    common_format((up, down))
    dtype = torch.promote_types(up.dtype, down.dtype)
    ups, up_scale, inner = _pack(up, dtype, pool)
    downs, down_scale, _ = _pack(down, dtype, pool)
    return PackedExperts(ups, downs, up_scale, down_scale, inner)


def _pack(matrices: Matrices, dtype: torch.dtype, pool: Pool) -> tuple[Panels, Tensor | None, int]:
    """Panels of all experts, their scales, and the outputs of each."""
    first = matrices[0]
    rows, columns = first.shape
    panels, scales = Panels.empty((len(matrices),), rows, columns, dtype), []
    for expert in range(len(matrices)):
        matrix = matrices[expert] if expert else first
        panels.pack(matrix.to(dtype) if isinstance(matrix, Tensor) else matrix, pool, (expert,))
        if (scale := scale_of(matrix)) is not None:
            scales.append(scale.clone())
    return panels, torch.stack(scales) if scales else None, rows


def route(logits: Tensor, bias: Tensor, routing: Routing, *, pool: Pool) -> Routes:
    """As the reference's."""
    logits = logits if logits.stride(1) == 1 else pool.contiguous(logits)
    rows, experts = logits.shape
    top_k = min(routing.top_k, experts)
    picked, weights = pool.empty(rows, top_k, dtype=torch.int64), pool.empty(rows, top_k)
    ROUTE(
        pool,
        pool.rows(logits),
        logits.stride(0),
        rows,
        experts,
        pool.rows(bias),
        top_k,
        routing.groups,
        min(routing.topk_groups, routing.groups),
        routing.normalise,
        routing.scale,
        picked.data_ptr(),
        weights.data_ptr(),
    )
    return Routes(picked, weights)


def experts(x: Tensor, packed: PackedExperts, routes: Routes, *, residual: Tensor | None = None, pool: Pool) -> Tensor:
    """As the reference's; an expert's weights are read once for all the rows that picked it."""
    rows, columns = x.shape
    y = pool.empty(rows, columns)
    if not rows:
        return y
    picked, weights = pool.contiguous(routes.experts), pool.contiguous(routes.weights)
    EXPERTS(
        pool,
        pool.rows(x),
        x.stride(0),
        rows,
        picked.shape[1],
        picked.data_ptr(),
        weights.data_ptr(),
        packed.up.data.data_ptr(),
        packed.down.data.data_ptr(),
        packed.up.format,
        packed.up.data.shape[0],
        columns,
        packed.up.width,
        packed.inner,
        packed.down.width,
        0 if packed.up_scale is None else packed.up_scale.data_ptr(),
        0 if packed.down_scale is None else packed.down_scale.data_ptr(),
        0 if residual is None else pool.rows(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
    )
    return y
