"""Dense projections with what stands around them: y = residual + f(norm(x)) W^T + b.

Each row is bit for bit the same whatever rows stand beside it.

How the reference gets there. Found by fuzzing torch 2.13 with MKL over shapes, row positions, alignments and 1 to 16
threads (tests/kernels/test_linear.py keeps the evidence): ``torch.mm`` picks another algorithm for one or two rows,
and with N not a multiple of 16 its column tails change with the thread count, the row's place and the alignment of
memory. With N padded to multiples of 16 and rows computed in full tiles of 16 no difference was ever seen. So every
matrix product of the references goes through ``bmm`` below: one GEMM problem per tile, its shape fixed by the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.activation import relu2 as squared_relu
from headrace.kernels.norm import Norm, rms_norm

TILE = 16
"""Rows of a tile and granularity of N; see above."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as the reference wants it: [N rounded up to TILE, K] fp32, zero rows below ``out_features``."""

    weight: Tensor
    bias: Tensor | None  # [N] fp32
    out_features: int


def pack_linear(weights: Sequence[Tensor], bias: Tensor | None = None, *, dim: int = 0) -> PackedLinear:
    """Prepare weights [N_i, K_i] (fp32, bf16, fp16) and bias [N] fp32 for ``linear``; done once, at load.

    Several are one projection: with ``dim`` 0 their outputs stand side by side (all K_i equal), with ``dim`` 1 their
    inputs do, and the products are summed (all N_i equal).
    """
    weight = torch.cat(tuple(weights), dim)
    rows = weight.shape[0]
    packed = weight.float().contiguous()
    if rows % TILE:
        packed = pad(packed, (0, 0, 0, -rows % TILE))
    return PackedLinear(packed, None if bias is None else bias.float(), rows)


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


def tile_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N] fp32, in tiles of 16 rows."""
    rows, width = x.shape
    tiles = pad(x, (0, 0, 0, -rows % TILE)).contiguous().view(-1, TILE, width)
    return bmm(tiles, weight.t().expand(tiles.shape[0], -1, -1)).reshape(-1, weight.shape[0])[:rows]


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
