"""Dense projections: y = x W^T + b, each row bit for bit the same whatever rows stand beside it.

How the reference gets there. Found by fuzzing torch 2.13 with MKL over shapes, row positions, alignments and 1 to 16
threads (tests/kernels/test_linear.py keeps the evidence): ``torch.mm`` picks another algorithm for one or two rows,
and with N not a multiple of 16 its column tails change with the thread count, the row's place and the alignment of
memory. With N padded to multiples of 16 and rows computed in full tiles of 16 no difference was ever seen. So every
matrix product of the references goes through ``bmm`` below: one GEMM problem per tile, its shape fixed by the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 16
"""Rows of a tile and granularity of N; see above."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as the reference wants it: [N rounded up to TILE, K] fp32, zero rows below ``out_features``."""

    weight: Tensor
    bias: Tensor | None  # [N] fp32
    out_features: int


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Prepare a weight [N, K] (fp32, bf16, fp16) and bias [N] for ``linear``; done once, at load."""
    rows = weight.shape[0]
    packed = weight.float().contiguous()
    if rows % TILE:
        packed = pad(packed, (0, 0, 0, -rows % TILE))
    return PackedLinear(packed, None if bias is None else bias.float(), rows)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """x [T, K] fp32 (any strides) -> [T, N] fp32. T may be 0."""
    y = tile_linear(x, packed.weight)[:, : packed.out_features]
    return y if packed.bias is None else y + packed.bias


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
