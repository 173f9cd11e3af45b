"""Experts' weights in the order in which programs read them, packed at load and made bf16 operands in registers.

A program takes an expert's inner dimension unit by unit, and finds of each unit the rows of ``up`` and the columns of
``down`` beside each other. A unit is what one instruction multiplies along K: 16, but for FP8 and NVFP4 32 and 64,
because a thread reads 4 bytes beside each other; so a unit of any format is 64 KB or a little more at Super's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.formats import Format, Fp8, Nvfp4, Quantised, common_format
from headrace.kernels.moe import Matrices
from headrace.kernels.triton.common import cdiv
from headrace.kernels.triton.quantised import (
    LEAST_COLUMNS,
    block_factors,
    bytes_of,
    even_values,
    fp8_values,
    odd_values,
    packed_scale,
)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts in the order in which they are read. Inner units past I are zero.

    tiles: of each unit its rows of ``up``, then its columns of ``down``: bf16 or fp32 [E, ceil(I / 16), 2, 16, K]. Of
    quantised weights these of ``down`` row by row: uint8, FP8 [E, ceil(I / 32), 2, 32 K], NVFP4 [E, ceil(I / 64), 2,
    32 K].
    Of 64 rows of ``up`` NVFP4 has first the even, then the odd, since ``down`` has two of them in a byte.
    block_scales: uint8 [E, ceil(I / 64), 2, 256 G], of NVFP4, with G = ceil(K / 64): of ``up`` those of 64 columns for
    all rows after the other, [G, 64, 4], of ``down`` [K, 4].
    """

    tiles: Tensor
    up_scale: Tensor | None = None  # [E] fp32, of quantised weights
    down_scale: Tensor | None = None
    block_scales: Tensor | None = None

    @property
    def format(self) -> Format:
        return "float" if self.up_scale is None else "fp8" if self.block_scales is None else "nvfp4"

    @property
    def dtype(self) -> torch.dtype:
        """Of what is multiplied."""
        return self.tiles.dtype if self.up_scale is None else torch.bfloat16


def pack_experts(up: Matrices, down: Matrices) -> PackedExperts:
    """See ``headrace.kernels.moe.pack_experts``. fp16 becomes fp32. Beside the result only one expert is copied.

    Raises NotANumber for a quantised weight that holds NaN.
    """
    form = common_format((up, down))
    first = up[0]
    if isinstance(first, Tensor):
        return _pack_floats(first, up, down)
    inner, width = first.shape
    unit, count, groups = LEAST_COLUMNS[form], len(up), cdiv(width, 64)
    units = cdiv(inner, unit)
    row = width // (2 if form == "nvfp4" else 1)
    tiles = torch.empty(count, units, 2, unit * row, dtype=torch.uint8, device=first.device)
    blocks = None
    if form == "nvfp4":
        blocks = torch.zeros(count, units, 2, 256 * groups, dtype=torch.uint8, device=first.device)
    scales = torch.empty(2, count, dtype=torch.float32, device=first.device)
    for expert in range(count):
        for which, matrices in enumerate((up, down)):
            weight = first if not expert and not which else matrices[expert]
            assert isinstance(weight, Fp8 | Nvfp4)
            parts = _rows_by_unit(weight, unit) if which == 0 else _columns_by_unit(weight, unit)
            tiles[expert, :, which] = parts[0]
            if blocks is not None:
                blocks[expert, :, which, : parts[1].shape[1]] = parts[1]
            scales[which, expert] = packed_scale(form, weight.scale)
    return PackedExperts(tiles, scales[0], scales[1], blocks)


def _pack_floats(first: Tensor, up: Matrices, down: Matrices) -> PackedExperts:
    inner, width = first.shape
    unit = LEAST_COLUMNS["float"]
    dtype = torch.bfloat16 if up.dtype == down.dtype == torch.bfloat16 else torch.float32
    units = cdiv(inner, unit)
    tiles = torch.empty(len(up), units, 2, unit, width, dtype=dtype, device=first.device)
    padded = torch.zeros(2, units * unit, width, dtype=dtype, device=first.device)
    for expert in range(len(up)):
        matrix = up[expert] if expert else first
        assert isinstance(matrix, Tensor)
        padded[0, :inner] = matrix
        matrix = down[expert]
        assert isinstance(matrix, Tensor)
        padded[1, :inner] = matrix.t()
        tiles[expert] = padded.view(2, units, unit, width).transpose(0, 1)
    return PackedExperts(tiles)


def _rows_by_unit(weight: Quantised, unit: int) -> list[Tensor]:
    """Bytes of ``up`` [I, K], uint8 [units, bytes], as ``PackedExperts`` has them."""
    parts = [pad(part, (0, 0, 0, -part.shape[0] % unit)).unflatten(0, (-1, unit)) for part in bytes_of(weight)]
    if isinstance(weight, Fp8):
        return [part.flatten(1) for part in parts]
    codes, blocks = (torch.cat([part[:, ::2], part[:, 1::2]], 1) for part in parts)
    fours = pad(blocks, (0, -blocks.shape[2] % 4)).unflatten(2, (-1, 4))
    return [codes.flatten(1), fours.transpose(1, 2).flatten(1)]


def _columns_by_unit(weight: Quantised, unit: int) -> list[Tensor]:
    """The same of ``down`` [K, I]."""
    parts = bytes_of(weight)
    widths = [unit * part.shape[1] // weight.shape[1] for part in parts]  # bytes of a unit
    padded = [pad(part, (0, -part.shape[1] % width)) for part, width in zip(parts, widths, strict=True)]
    return [
        part.unflatten(1, (-1, width)).transpose(0, 1).flatten(1) for part, width in zip(padded, widths, strict=True)
    ]


@triton.constexpr_function
def half_unit(k, unit, form):
    """Elements of ``tiles`` that a unit of ``up``, or of ``down``, takes."""
    return k * unit // (2 if form == "nvfp4" else 1)


@triton.constexpr_function
def half_blocks(k):
    """Block scales that a unit of ``up``, or of ``down``, has room for."""
    return 256 * ((k + 63) // 64)


@triton.jit
def times_up(
    even,
    odd,
    tiles,
    blocks,
    column,
    rows,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    acc=None,
):
    """a times ROWS rows of quantised ``up`` from a unit's row FIRST on: [..., 16, ROWS] fp32.

    a: bf16 [PARTS, 16, COLUMNS] or [16, COLUMNS], ``as_read``: columns ``column`` on, those of each part after the
    other. There are K of them, and ``rows`` rows.
    """
    PARTS: tl.constexpr = even.shape[0] if len(even.shape) == 3 else 1
    EACH: tl.constexpr = 2 if FORMAT == "nvfp4" else 1  # columns of a byte
    UNIT: tl.constexpr = 64 if FORMAT == "nvfp4" else 32
    row = FIRST + tl.arange(0, ROWS)[None, :, None]
    byte = tl.arange(0, PARTS)[:, None, None] * (COLUMNS // EACH) + tl.arange(0, COLUMNS // EACH)[None, None, :]
    byte += column // EACH
    offsets = (row if ROWS <= UNIT else row // UNIT * (2 * UNIT) + row % UNIT) * (K // EACH) + byte
    stored = _load(tiles + offsets, (row < rows) & (byte < K // EACH), PARTS * COLUMNS == K and ROWS <= UNIT)
    if FORMAT == "nvfp4":
        FOURS: tl.constexpr = COLUMNS // 64
        four = column // 64 + tl.arange(0, PARTS * FOURS)[:, None]
        within = 4 * FIRST + tl.arange(0, 4 * ROWS)[None, :]
        found = _load(blocks + four * (4 * UNIT) + within, 64 * four < K, PARTS * COLUMNS == K)
        found = tl.permute(tl.reshape(found, (PARTS, FOURS, ROWS, 4)), (0, 2, 1, 3))
        found = tl.reshape(found, (PARTS, ROWS, 4 * FOURS))
    else:
        found = None
    return _times(even, odd, stored, found, acc)


@triton.jit
def times_down(
    even,
    odd,
    tiles,
    blocks,
    column,
    rows,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    acc,
):
    """a times ROWS inner units of quantised ``down`` from a unit on, added to acc [16, COLUMNS].

    a: bf16 [16, ROWS], of NVFP4 its even and its odd units. Outputs are ``column`` on; there are K of them, and
    ``rows`` inner units. blocks: of the whole unit.
    """
    EACH: tl.constexpr = 2 if FORMAT == "nvfp4" else 1  # inner units of a byte
    UNIT: tl.constexpr = 64 if FORMAT == "nvfp4" else 32
    output = column + tl.arange(0, COLUMNS)[None, :, None]
    byte = tl.arange(0, ROWS // EACH)[None, None, :]
    offsets = output * (UNIT // EACH) + byte
    if ROWS > UNIT:
        offsets = byte // UNIT * (2 * UNIT * K) + output * UNIT + byte % UNIT
    stored = _load(tiles + offsets, (output < K) & (byte < rows), COLUMNS == K and ROWS == UNIT)
    if FORMAT == "nvfp4":
        within = 4 * column + tl.arange(0, 4 * COLUMNS)
        found = tl.reshape(_load(blocks + half_blocks(K) + within, within < 4 * K, COLUMNS == K), (1, COLUMNS, 4))
    else:
        found = None
    return _times(even, odd, stored, found, acc)


@triton.jit
def _load(pointers, there, ALL: tl.constexpr):
    """Stored bytes, 0 where ``there`` is not; ALL: it is everywhere.

    They are read once: L2 shall rather keep the partial sums.
    """
    if ALL:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=there, other=0, eviction_policy="evict_first")


@triton.jit
def _times(even, odd, stored, scales, acc):
    """``as_read`` a [P, M, K] or [M, K] bf16 times what is stored [P or 1, N, K], transposed: [P, M, N] or [M, N] fp32.

    Of NVFP4 first the even columns, then the odd: all at once they would not fit into registers beside the sums.
    """
    if scales is None:
        return tl.dot(even, _transposed(fp8_values(stored), even), acc)
    else:
        factors = block_factors(scales)
        acc = tl.dot(even, _transposed(even_values(stored, factors), even), acc)
        return tl.dot(odd, _transposed(odd_values(stored, factors), even), acc)


@triton.jit
def as_read(a, FORMAT: tl.constexpr):
    """(the even, the odd columns) of a [P, M, K] or [M, K] for NVFP4; (a, a) for another format."""
    if FORMAT != "nvfp4":
        return a, a
    elif len(a.shape) == 3:
        return tl.split(tl.reshape(a, (a.shape[0], a.shape[1], a.shape[2] // 2, 2)))
    else:
        return tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))


@triton.jit
def _transposed(values, like):
    """[P, N, K] -> [P, K, N], or without the first axis, which is 1, if ``like`` has none."""
    if len(like.shape) == 3:
        return tl.permute(values, (0, 2, 1))
    else:
        return tl.permute(tl.reshape(values, (values.shape[1], values.shape[2])), (1, 0))
