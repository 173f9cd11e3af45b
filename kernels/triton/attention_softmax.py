"""What decode and prompts share: rows of the pages, and the online softmax over one tile of keys.

A tile's queries are pairs of (token, query head of a kv head's group), so that a key is read once for all heads that
share it. Their number may follow the batch, because no sum depends on a layout of registers: scores, P V and the mass
(P times ones) are dots, whose order is that of K, and maxima have no order. Tiles of keys start at absolute multiples
of their length, and keys beyond a query's own position change nothing: p = 0, and sums shrink by 2^0.

Up to 32 queries are a tile of rank 2, of which the warps share the keys (scores) and the channels (P V). More are of
rank 3, [warps, queries of a warp, ...]: each warp has rows of its own and reads all keys. Both are mma.sync m16n8k16 on
every architecture, in the same order of K. Tiles of keys have the rank from the load on, as [1, KEYS, ...]: what gains
its axis after the load is not copied to shared memory asynchronously. So functions here take tiles of either rank,
"..." in their shapes being nothing or one axis.

Queries and P are rounded to the dtype of the pages, or to fp16 for fp8 pages: it holds every e4m3 number, converts in
one instruction for two (bf16 takes two more for each), and has three bits more. So |q| must be below 65504 there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.attention import Pages
from headrace.kernels.triton.target import architecture

MIN_FP8_ARCH = 89
"""The first architecture that converts from and to e4m3."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a program. ``keys`` is part of the numerics: it follows from the pages' dtype alone."""

    queries: tuple[int, ...]  # (queries,) or (warps, queries of a warp)
    keys: int  # tokens per step of the online softmax
    num_warps: int
    num_stages: int

    @property
    def pairs(self) -> int:
        return math.prod(self.queries)


def make_tiles(queries: int, keys: int, pages: Pages, arch: int) -> Tiles:
    """As asked for, with as many stages as there is shared memory for."""
    dtype, width = pages.keys.dtype, padded(pages.keys.shape[3])
    if dtype == torch.float32:
        keys = 32
    # Bytes for two CTAs an SM, each with one tile less than it has stages; where that is little, more tiles for one.
    shared = (112 if arch in (90, 100, 103) else 80) * 1024 - queries * width * max(2, dtype.itemsize)
    shape: tuple[int, ...] = (queries,)
    num_warps = 4
    if queries > 32 and dtype == torch.float32:  # no tensor cores: the order of K is that of any other shape
        num_warps = 8
    elif queries > 32:
        shape, num_warps = (queries // 16, 16), queries // 16
        if dtype == torch.float8_e4m3fn:
            shared -= num_warps * keys * width * 2  # the converted values, which Triton stores for each warp
    tile = 2 * keys * width * dtype.itemsize  # bytes of keys and values
    return Tiles(shape, keys, num_warps, num_stages=1 + max(1, min(3, shared // tile)))


def checked(pages: Pages) -> int:
    """The architecture. Raises ValueError for pages that the kernels cannot read there."""
    arch = architecture(pages.keys.device)
    if pages.keys.dtype == torch.float8_e4m3fn:
        if arch < MIN_FP8_ARCH:
            raise ValueError(f"float8_e4m3fn pages need sm_{MIN_FP8_ARCH}, this is sm_{arch}: keep them in bfloat16")
        if pages.keys.shape[3] % 16:
            raise ValueError(f"float8_e4m3fn pages need heads of a multiple of 16, not {pages.keys.shape[3]}")
    if not (pages.keys.is_contiguous() and pages.values.is_contiguous()):
        raise ValueError("pages must be contiguous")
    return arch


def score_factor(scale: float, pages: Pages) -> float:
    """From a dot of a query with a stored key to a score as a power of two."""
    return scale * pages.k_scale * math.log2(math.e)


@triton.constexpr_function
def padded(width):
    """Columns of a tile for heads of ``width``: what arange and the dots' K can be."""
    return max(16, triton.next_power_of_2(width))


@triton.constexpr_function
def keys_shape(queries, keys):
    """Shape of a tile's tokens, in the rank of its queries."""
    return (keys,) if len(queries) == 1 else (1, keys)


@triton.constexpr_function
def extended(shape, last):
    """The shape with one more axis."""
    return (*shape, last)


@triton.jit
def indices(SHAPE: tl.constexpr):
    """0, 1, 2, ... in row-major order; of rank 1 or 2."""
    if len(SHAPE) == 2:
        return tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    else:
        return tl.arange(0, SHAPE[0])


@triton.jit
def page_rows(table, tokens, last, PAGE: tl.constexpr):
    """Rows of the pages, seen as one run of rows, that hold the tokens; beyond ``last`` the table is not read."""
    page = tl.load(table + tokens // PAGE, mask=tokens <= last, other=0)
    return page * PAGE + tokens % PAGE


@triton.jit
def write_rows(new, new_rows, new_stride, memory, rows, row_width, valid, scale, WIDTH: tl.constexpr):
    """memory[rows] = new[new_rows] / scale, WIDTH elements each, rounded to nearest even; fp8 saturates."""
    d = tl.arange(0, padded(WIDTH))
    mask = valid[:, None] & (d < WIDTH)[None, :]
    values = tl.load(new + (new_rows * new_stride)[:, None] + d[None, :], mask=mask, other=0.0)
    at = (rows.to(tl.int64) * row_width)[:, None] + d[None, :]
    # Triton's fp32 -> fp8 is cvt.rn.satfinite.
    tl.store(memory + at, tl.div_rn(values, scale).to(memory.dtype.element_ty), mask=mask)


@triton.jit
def load_queries(q, offsets, valid, keys, WIDTH: tl.constexpr):
    """Queries [..., padded(WIDTH)] at offsets [...], in the dtype they are multiplied in, 0 where there is none."""
    d = tl.arange(0, padded(WIDTH))
    tile = tl.load(q + last_axis(offsets) + d, mask=last_axis(valid) & (d < WIDTH), other=0.0)
    return _operand(tile, keys.dtype.element_ty)


@triton.jit
def load_keys(keys, values, rows, row_width, valid, WIDTH: tl.constexpr):
    """Keys and values [..., KEYS, padded(WIDTH)] of rows [..., KEYS], 0 where not valid; see ``_load_rows``."""
    COLUMNS: tl.constexpr = padded(WIDTH)
    key = _load_rows(keys, rows, row_width, valid, WIDTH, COLUMNS)
    if values.dtype.element_ty == tl.float8e4nv:
        words = values.to(tl.pointer_type(tl.int32), bitcast=True)
        return key, _load_rows(words, rows, row_width // 4, valid, WIDTH // 4, COLUMNS // 4)
    else:
        return key, _load_rows(values, rows, row_width, valid, WIDTH, COLUMNS)


@triton.jit
def _load_rows(memory, rows, row_width, valid, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of the pages. fp8 values come as words of four: as bytes they would be picked one by one from shared
    memory, across the rows, which is how the second dot wants them."""
    d = tl.arange(0, COLUMNS)
    at = last_axis(rows.to(tl.int64) * row_width) + d
    return tl.load(memory + at, mask=last_axis(valid) & (d < WIDTH), other=0.0)


@triton.jit
def _operand(tile, stored: tl.constexpr):
    """The tile in the dtype in which pages of dtype ``stored`` are multiplied."""
    if stored == tl.float8e4nv:
        return tile.to(tl.float16)
    else:
        return tile.to(stored)


@triton.jit
def _unpacked(words):
    """The four e4m3 numbers of every word, the lowest byte first: [..., words] int32 -> [..., 4 * words] fp16."""
    even = tl.join(_byte(words, 0), _byte(words, 2))
    odd = tl.join(_byte(words, 1), _byte(words, 3))
    if len(words.shape) == 2:
        return tl.reshape(tl.join(even, odd), (words.shape[0], 4 * words.shape[1]))
    else:
        return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 4 * words.shape[2]))


@triton.jit
def _byte(words, INDEX: tl.constexpr):
    return (words >> 8 * INDEX & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def no_sums(SHAPE: tl.constexpr, WIDTH: tl.constexpr):
    """peak and mass [*SHAPE], acc [*SHAPE, padded(WIDTH)] over no keys."""
    peak = tl.full(SHAPE, float("-inf"), tl.float32)
    return peak, tl.zeros(SHAPE, tl.float32), tl.zeros(extended(SHAPE, padded(WIDTH)), tl.float32)


@triton.jit
def attend(q, key, value, visible, factor, peak, mass, acc):
    """One step of the online softmax: a tile of keys more, of which a query sees the visible ones [..., QUERIES, KEYS].

    peak is the largest score so far, as a power of two; mass is the sum of p = 2^(score - peak), and acc that of p v,
    with p rounded alike in both.
    """
    key = _operand(key, key.dtype)
    if value.dtype == tl.int32:
        value = _unpacked(value)
    scores = tl.where(visible, _dot(q, tl.trans(key)) * factor, float("-inf"))
    peak, base, shrink, _ = rescale(peak, tl.max(scores, -1))
    p = tl.exp2(scores - last_axis(base)).to(value.dtype)
    ones = tl.full(extended(value.shape[:-1], 16), 1.0, value.dtype)
    mass = mass * shrink + tl.max(_dot(p, ones), -1)  # all columns are alike
    acc = _dot(p, value, acc * last_axis(shrink))
    return peak, mass, acc


@triton.jit
def _dot(a, b, acc=None):
    """[acc +] a @ b: [M, K] @ [K, N], or [warps, M, K] @ [1, K, N]."""
    if len(a.shape) == 3:
        b = tl.broadcast_to(b, (a.shape[0], b.shape[1], b.shape[2]))
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def last_axis(tile):
    """The tile with one more axis, of one element."""
    return tl.expand_dims(tile, -1)


@triton.jit
def rescale(peak, other):
    """The larger peak, the same with 0 for -inf, and the factors that bring sums under either peak to it."""
    larger = tl.maximum(peak, other)
    base = tl.where(larger == float("-inf"), 0.0, larger)  # who has seen nothing gets the factor 0, not NaN
    return larger, base, tl.exp2(peak - base), tl.exp2(other - base)


@triton.jit
def store_means(out, row_stride, pair, pairs, sums, v_scale, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """acc / mass of the pairs (row, head of the group) below ``pairs``, to rows row_stride apart."""
    _, mass, acc = sums
    at = pair // GROUP * row_stride + pair % GROUP * WIDTH
    store_tile(out, at, pair < pairs, acc * last_axis(tl.div_rn(v_scale, mass)), WIDTH)


@triton.jit
def store_tile(memory, offsets, valid, tile, WIDTH: tl.constexpr):
    """WIDTH columns of each valid row of the tile, to its offset."""
    d = tl.arange(0, padded(WIDTH))
    tl.store(memory + last_axis(offsets) + d, tile, mask=last_axis(valid) & (d < WIDTH))
