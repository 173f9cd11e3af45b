"""Dense projections, embedding and packed weights; see ``kernels/linear.py`` for the contracts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from headrace.kernels.formats import BLOCK, Fp8, NotANumber, Weight, common_format, format_of, tensors_of
from headrace.kernels.linear import check_prologue
from headrace.kernels.native.library import Op, Pool, empty, prefer_huge_pages
from headrace.kernels.norm import Norm

PANEL = 32
"""Outputs of a panel; tile.h."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}
"""By the dtype of what is stored; uint8 is NVFP4."""

FP8_READ_AS = 1 / 256
"""panels.h reads e4m3 as this share of its value; the weight's scale makes up for it."""

PACK = Op("pack", "qqqqqqqqqqq")
EMBED = Op("embed", "qqqqqqqq")
LINEAR = Op("linear", "qqqqqqqqqqqqqqdqqqqq")


@dataclass(frozen=True, slots=True)
class Panels:
    """Matrices of one format as the kernels want them; panels.h."""

    data: Tensor  # [..., N / 32 rounded up, 32 outputs over width: in elements, uint8 for NVFP4]
    dtype: torch.dtype  # a key of FORMATS
    width: int  # K rounded up to what the format reads together

    @classmethod
    def empty(cls, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype) -> Panels:
        """Memory for them; zeros where some of it belongs to no weight."""
        width = columns + columns % 2
        elements = width * PANEL if dtype is not torch.uint8 else width // BLOCK * (PANEL + BLOCK * PANEL // 2)
        panels = empty(*stack, -(-rows // PANEL), elements, dtype=dtype)
        prefer_huge_pages(panels.data_ptr(), panels.nbytes)
        if rows % PANEL or columns % 2:
            panels.view(torch.uint8).zero_()
        return cls(panels, dtype, width)

    @property
    def format(self) -> int:
        return FORMATS[self.dtype]

    def pack(self, weight: Weight, pool: Pool, at: tuple[int, ...] = (), row: int = 0, column: int = 0) -> None:
        """weight [rows, columns], in the panels' dtype, into its place among outputs and K. Raises NotANumber for a
        quantised one that holds NaN."""
        source, *scales = (part.contiguous() for part in tensors_of(weight))
        nans = empty(1, dtype=torch.int64).zero_()
        PACK(
            pool,
            source.data_ptr(),
            self.format,
            *weight.shape,
            source.stride(0),
            scales[0].data_ptr() if len(scales) == 2 else 0,
            self.data[at].data_ptr(),
            self.width,
            row,
            column,
            nans.data_ptr(),
        )
        if nans.item():
            assert not isinstance(weight, Tensor)
            raise NotANumber(weight)


def scale_of(weight: Weight) -> Tensor | None:
    """The factor [] fp32 of the kernels' products; None for float weights."""
    if isinstance(weight, Tensor):
        return None
    return weight.scale / FP8_READ_AS if isinstance(weight, Fp8) else weight.scale


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as the kernel wants it."""

    panels: Panels
    scale: Tensor | None  # [N] fp32
    bias: Tensor | None  # [N] fp32
    out_features: int
    in_features: int


def pack_linear(weights: Sequence[Weight], bias: Tensor | None = None, *, dim: int = 0, pool: Pool) -> PackedLinear:
    """As the reference's; floats in the widest dtype among them."""
    if common_format(weights) != "float" and dim == 1 and len(weights) > 1:
        raise ValueError(f"{len(weights)} {format_of(weights[0])} weights with dim 1: each has a scale of its own")
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    along = sum(weight.shape[dim] for weight in weights)
    rows, columns = (along, weights[0].shape[1]) if dim == 0 else (weights[0].shape[0], along)
    panels, place, scales = Panels.empty((), rows, columns, dtype), [0, 0], []
    for weight in weights:
        panels.pack(weight.to(dtype) if isinstance(weight, Tensor) else weight, pool, (), *place)
        place[dim] += weight.shape[dim]
        if (scale := scale_of(weight)) is not None:
            scales.append(scale.expand(weight.shape[0]))
    scale = torch.cat(scales) if scales else None
    return PackedLinear(panels, scale, None if bias is None else bias.float().contiguous(), rows, columns)


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
    y = pool.empty(rows, packed.out_features)
    if not rows:
        return y
    LINEAR(
        pool,
        pool.rows(first),
        0 if second is None else pool.rows(second),
        first.stride(0),
        0 if second is None else second.stride(0),
        columns,
        packed.in_features - columns,
        rows,
        packed.panels.data.data_ptr(),
        packed.panels.format,
        packed.panels.width,
        packed.out_features,
        0 if packed.scale is None else packed.scale.data_ptr(),
        0 if packed.bias is None else packed.bias.data_ptr(),
        0 if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.eps,
        1 if norm is None else norm.groups,
        (0 if second is None else columns) if relu2 else packed.in_features,
        0 if residual is None else pool.rows(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
    )
    return y


def embed(weight: Tensor, token_ids: Tensor, *, pool: Pool) -> Tensor:
    """As the reference's."""
    weight = weight if weight.stride(1) == 1 else pool.contiguous(weight)
    rows, columns = token_ids.shape[0], weight.shape[1]
    y = pool.empty(rows, columns)
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
