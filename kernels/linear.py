"""Dense projections with what stands around them: y = residual + f(norm(x)) W^T + b.

Each row is bit for bit the same whatever rows stand beside it.

How the reference gets there. Found by fuzzing torch 2.13 with MKL over shapes, row positions, alignments and 1 to 16
threads (tests/kernels/test_linear.py keeps the evidence): ``torch.mm`` picks another algorithm for one or two rows,
and with N not a multiple of 16 its column tails change with the thread count, the row's place and the alignment of
memory. With N padded to multiples of 16 and rows computed in full tiles of 16 no difference was ever seen. So every
matrix product of the references goes through ``bmm`` below: one GEMM problem per tile, its shape fixed by the weight.

A quantised weight (``kernels.formats``) stays as it is stored. A block of its outputs at a time is expanded to fp32 and
multiplied with; its scale multiplies the finished sums, before bias and residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.activation import relu2 as squared_relu
from headrace.kernels.formats import Fp8, Nvfp4, Quantised, Weight, check_numbers, common_format
from headrace.kernels.norm import Norm, rms_norm

TILE = 16
"""Rows of a tile and granularity of N; see above."""


EXPANDED = 1 << 20
"""Elements of a quantised weight that are expanded at a time, about: 4 MiB of fp32."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as the reference wants it: N rounded up to TILE, zero rows below ``out_features``."""

    weight: Weight  # [N rounded up, K]; a float one is fp32, a quantised one's own scale is 1
    scale: Tensor | None  # [N] fp32, of a quantised weight's outputs
    bias: Tensor | None  # [N] fp32
    out_features: int


def pack_linear(weights: Sequence[Weight], bias: Tensor | None = None, *, dim: int = 0) -> PackedLinear:
    """Prepare weights [N_i, K_i] and bias [N] fp32 for ``linear``; done once, at load.

    Several are one projection: with ``dim`` 0 their outputs stand side by side (all K_i equal), with ``dim`` 1 their
    inputs do, and the products are summed (all N_i equal). Weights are all fp32, bf16 or fp16, or all ``Fp8``, or all
    ``Nvfp4``; quantised ones may differ in their scales, and are one alone with ``dim`` 1.

    Raises ValueError for weights of several formats, and for several quantised ones with ``dim`` 1; NotANumber for a
    quantised one that holds NaN.
    """
    packed: Weight
    scale = None
    if common_format(weights) == "float":
        packed = _padded(torch.cat([w for w in weights if isinstance(w, Tensor)], dim).float().contiguous())
    else:
        packed, scale = _pack_quantised([w for w in weights if not isinstance(w, Tensor)], dim)
    rows = weights[0].shape[0] if dim == 1 else sum(w.shape[0] for w in weights)
    return PackedLinear(packed, scale, None if bias is None else bias.float(), rows)


def _pack_quantised(weights: list[Quantised], dim: int) -> tuple[Weight, Tensor]:
    """The bytes of all as one weight, and the scale of each output."""
    if dim == 1 and len(weights) > 1:
        raise ValueError(f"{len(weights)} {weights[0].format} weights with dim 1: each has a scale of its own")
    for weight in weights:
        check_numbers(weight)
    scale = torch.cat([w.scale.expand(w.shape[0]) for w in weights])
    one = torch.ones((), device=scale.device)
    if isinstance(weights[0], Fp8):
        return Fp8(_joined([w.values for w in weights if isinstance(w, Fp8)]), one), scale
    fp4 = [w for w in weights if isinstance(w, Nvfp4)]
    codes, blocks = _joined([w.codes for w in fp4]), _joined([w.block_scales for w in fp4])
    return Nvfp4(codes, blocks, one), scale


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of all, and zero rows up to a whole tile; by their bits, as not every op knows fp8."""
    bits = _padded(torch.cat([part.view(torch.uint8) for part in parts]))
    return bits.view(parts[0].dtype)


def _padded(weight: Tensor) -> Tensor:
    missing = -weight.shape[0] % TILE
    return pad(weight, (0, 0, 0, missing)) if missing else weight


def linear(
    x: Tensor | tuple[Tensor, Tensor],
    packed: PackedLinear,
    *,
    norm: Norm | None = None,
    relu2: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [T, K] fp32 (rows strided as they like, channels contiguous), or two with K in all -> [T, N] fp32.

    Either ``norm`` is applied to x (to both as one row; each of several groups lies in one of them), or ``relu2``,
    max(x, 0)^2, to x or the second of the two. ``residual`` [T, N] fp32 is added to the result. T may be 0.

    Raises ValueError for both norm and relu2, and for a group that lies in both inputs.
    """
    parts: tuple[Tensor, ...] = x if isinstance(x, tuple) else (x,)
    check_prologue(parts[0].shape[1], packed.weight.shape[1], norm, relu2)
    if norm is not None:
        widths = [part.shape[1] for part in parts]
        parts = torch.split(rms_norm(torch.cat(parts, 1), norm), widths, 1)
    if relu2:
        parts = (*parts[:-1], squared_relu(parts[-1]))
    y = tile_linear(torch.cat(parts, 1), packed.weight)[:, : packed.out_features]
    if packed.scale is not None:
        y = y * packed.scale
    if packed.bias is not None:
        y = y + packed.bias
    return y if residual is None else residual + y


def check_prologue(first: int, width: int, norm: Norm | None, relu2: bool) -> None:
    """Raise what ``linear`` raises. ``first`` of ``width`` columns come from the first input."""
    if norm is None:
        return
    if relu2:
        raise ValueError("norm and relu2 are not both applied by one projection")
    if norm.groups > 1 and first % (width // norm.groups):
        raise ValueError(f"one of {norm.groups} groups of {width} channels lies in both inputs, {first} in the first")


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of an embedding: weight [vocab, H] of any float dtype, token_ids [T] int64 -> [T, H] fp32."""
    return weight.index_select(0, token_ids).float()


def tile_linear(x: Tensor, weight: Weight) -> Tensor:
    """x [T, K] times weight [N, K] (unscaled) transposed -> [T, N] fp32, in tiles of 16 rows."""
    rows, width = x.shape
    tiles = pad(x, (0, 0, 0, -rows % TILE)).contiguous().view(-1, TILE, width)
    return multiply_tiles(tiles, weight).reshape(-1, weight.shape[0])[:rows]


def multiply_tiles(tiles: Tensor, weight: Weight) -> Tensor:
    """tiles [B, 16, K] times weight [N, K] (unscaled) transposed -> [B, 16, N] fp32.

    A quantised weight is expanded in blocks of rows, whose number follows from K alone.
    """
    if isinstance(weight, Tensor):
        return bmm(tiles, weight.t().expand(tiles.shape[0], -1, -1))
    features, width = weight.shape
    block = max(TILE, EXPANDED // max(width, 1) // TILE * TILE)
    products = [
        multiply_tiles(tiles, weight.rows(first, min(first + block, features)).unscaled().float())
        for first in range(0, max(features, 1), block)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, 2)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N] fp32.

    An element's bits depend on its row, its column and the shape (M, K, N), not on B, on the other rows or on the
    number of threads. Callers keep (M, K, N) fixed by the configuration: then nothing else can matter.
    """
    rows, columns = a.shape[1], b.shape[2]
    if rows % TILE:
        a = pad(a, (0, 0, 0, -rows % TILE))
    if columns % TILE:
        b = pad(b, (0, -columns % TILE))
    return torch.bmm(a, b)[:, :rows, :columns]
