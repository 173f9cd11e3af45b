"""Dense projections, embedding and packed weights; see ``kernels/linear.py`` for the contracts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from headrace.kernels.linear import check_prologue
from headrace.kernels.native.library import Op, Pool, empty, prefer_huge_pages, rows_of
from headrace.kernels.norm import Norm

PANEL = 32
"""Outputs of a panel; tile.h."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

PACK = Op("pack", "qqqqqqqqq")
EMBED = Op("embed", "qqqqqqqq")
LINEAR = Op("linear", "qqqqqqqqqqqqqdqqqqq")


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as the kernel wants it."""

    panels: Tensor  # [N / 32 rounded up, K rounded up to even, 32]; the order within two k is the dtype's, tile.h
    bias: Tensor | None  # [N] fp32
    out_features: int
    in_features: int


def pack_linear(weights: Sequence[Tensor], bias: Tensor | None = None, *, dim: int = 0, pool: Pool) -> PackedLinear:
    """The weights in the widest dtype among them, as one."""
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    along = sum(weight.shape[dim] for weight in weights)
    rows, columns = (along, weights[0].shape[1]) if dim == 0 else (weights[0].shape[0], along)
    panels = empty_panels((), rows, columns, dtype)
    at = 0
    for weight in weights:
        pack_into(panels, weight.to(dtype), at if dim == 0 else 0, at if dim == 1 else 0, pool)
        at += weight.shape[dim]
    return PackedLinear(panels, None if bias is None else bias.float().contiguous(), rows, columns)


def empty_panels(stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for panels; zeros where some of it belongs to no weight."""
    panels = empty(*stack, -(-rows // PANEL), columns + columns % 2, PANEL, dtype=dtype)
    prefer_huge_pages(panels.data_ptr(), panels.nbytes)
    return panels.zero_() if rows % PANEL or columns % 2 else panels


def pack_into(panels: Tensor, weight: Tensor, first_row: int, first_column: int, pool: Pool) -> None:
    """weight [rows, columns], in the panels' dtype, into its place among outputs and K."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, columns = weight.shape
    width = panels.shape[-2]
    PACK(
        pool,
        weight.data_ptr(),
        FORMATS[panels.dtype],
        rows,
        columns,
        weight.stride(0),
        panels.data_ptr(),
        width,
        first_row,
        first_column,
    )


def linear(
    x: Tensor | tuple[Tensor, Tensor],
    packed: PackedLinear,
    *,
    norm: Norm | None = None,
    relu2: bool = False,
    residual: Tensor | None = None,
    pool: Pool,
) -> Tensor:
    """As the reference's; K in order."""
    first, second = x if isinstance(x, tuple) else (x, None)
    rows, columns = first.shape
    check_prologue(columns, packed.in_features, norm, relu2)
    width = columns + (0 if second is None else second.shape[1])
    if width != packed.in_features:
        raise ValueError(f"a weight of {packed.in_features} inputs for rows of {width}")
    y = empty(rows, packed.out_features)
    if not rows:
        return y
    LINEAR(
        pool,
        rows_of(first),
        0 if second is None else rows_of(second),
        first.stride(0),
        0 if second is None else second.stride(0),
        columns,
        packed.in_features - columns,
        rows,
        packed.panels.data_ptr(),
        FORMATS[packed.panels.dtype],
        packed.panels.shape[-2],
        packed.out_features,
        0 if packed.bias is None else packed.bias.data_ptr(),
        0 if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.eps,
        1 if norm is None else norm.groups,
        (0 if second is None else columns) if relu2 else packed.in_features,
        0 if residual is None else rows_of(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
    )
    return y


def embed(weight: Tensor, token_ids: Tensor, *, pool: Pool) -> Tensor:
    """As the reference's."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, columns = token_ids.shape[0], weight.shape[1]
    y = empty(rows, columns)
    EMBED(
        pool,
        weight.data_ptr(),
        FORMATS[weight.dtype],
        weight.stride(0),
        columns,
        token_ids.data_ptr(),
        token_ids.stride(0),
        rows,
        y.data_ptr(),
    )
    return y
