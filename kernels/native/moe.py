"""Routed experts; see ``kernels/moe.py`` for the contracts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.moe import Matrices, Routes, Routing
from headrace.kernels.native.library import Op, Pool, empty, rows_of
from headrace.kernels.native.linear import FORMATS, empty_panels, pack_into

ROUTE = Op("route", "qqqqqqqqqdqq")
EXPERTS = Op("experts", "qqqqqqqqqqqqqqqqq")


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts as the kernel wants them: [E, panels, K, 32], tile.h."""

    up: Tensor
    down: Tensor
    inner: int


def pack_experts(up: Matrices, down: Matrices, *, pool: Pool) -> PackedExperts:
    """Both in the wider dtype of the two."""
    dtype = torch.promote_types(up.dtype, down.dtype)
    panels, inner = _pack(up, dtype, pool)
    return PackedExperts(panels, _pack(down, dtype, pool)[0], inner)


def _pack(matrices: Matrices, dtype: torch.dtype, pool: Pool) -> tuple[Tensor, int]:
    """Panels of all experts, and the outputs of each."""
    first = matrices[0]
    rows, columns = first.shape
    panels = empty_panels((len(matrices),), rows, columns, dtype)
    for expert in range(len(matrices)):
        pack_into(panels[expert], (matrices[expert] if expert else first).to(dtype), 0, 0, pool)
    return panels, rows


def route(logits: Tensor, bias: Tensor, routing: Routing, *, pool: Pool) -> Routes:
    """As the reference's."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, experts = logits.shape
    top_k = min(routing.top_k, experts)
    picked, weights = empty(rows, top_k, dtype=torch.int64), empty(rows, top_k)
    ROUTE(
        pool,
        rows_of(logits),
        logits.stride(0),
        rows,
        experts,
        rows_of(bias),
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
    y = empty(rows, columns)
    if not rows:
        return y
    picked, weights = routes.experts.contiguous(), routes.weights.contiguous()
    EXPERTS(
        pool,
        rows_of(x),
        x.stride(0),
        rows,
        picked.shape[1],
        picked.data_ptr(),
        weights.data_ptr(),
        packed.up.data_ptr(),
        packed.down.data_ptr(),
        FORMATS[packed.up.dtype],
        packed.up.shape[0],
        columns,
        packed.up.shape[2],
        packed.inner,
        packed.down.shape[2],
        0 if residual is None else rows_of(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
    )
    return y
