"""What decode and prompts share: rows of the pages, and the online softmax over one tile of keys.

A tile's queries are pairs of (token, query head of a kv head's group), so that a key is read once for all heads that
share it. Their number may follow the batch, because no sum depends on a layout of registers: scores, P V and the mass
(P times ones) are dots, whose order is that of K, and maxima have no order. Tiles of keys start at absolute multiples
of their length, and keys beyond a query's own position change nothing: p = 0, and sums shrink by 2^0.

Dots are of rank 3 (see ``common.mma``), and so are the tiles from the load on: a tile that gains its axis after the
load is not copied to shared memory asynchronously.

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

    queries: int
    keys: int  # tokens per step of the online softmax
    num_warps: int
    num_stages: int


def make_tiles(queries: int, keys: int, num_warps: int, pages: Pages, arch: int) -> Tiles:
    """As asked for, with as many stages as there is shared memory for."""
    if pages.keys.dtype == torch.float32:  # multiplied without tensor cores, with operands in registers
        keys = 32
    tile = 2 * keys * padded(pages.keys.shape[3]) * pages.keys.itemsize  # bytes: keys and values
    # Two CTAs an SM, each with one tile less than it has stages; where that is little, a second tile for one CTA.
    shared = (112 if arch in (90, 100, 103) else 80) * 1024
    return Tiles(queries, keys, num_warps, num_stages=1 + max(1, min(3, shared // tile)))


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
    """Queries [1, N, padded(WIDTH)] in the dtype they are multiplied in, 0 where there is none."""
    d = tl.arange(0, padded(WIDTH))
    tile = tl.load(q + offsets[:, None] + d[None, :], mask=valid[:, None] & (d < WIDTH)[None, :], other=0.0)
    return _operand(tile, keys.dtype.element_ty)[None, :, :]


@triton.jit
def load_keys(keys, values, rows, row_width, valid, WIDTH: tl.constexpr):
    """Keys and values [1, KEYS, padded(WIDTH)] as the pages hold them, 0 where not valid; see ``_load_rows``."""
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
    d = tl.arange(0, COLUMNS)[None, None, :]
    at = (rows.to(tl.int64) * row_width)[None, :, None] + d
    return tl.load(memory + at, mask=valid[None, :, None] & (d < WIDTH), other=0.0)


@triton.jit
def _operand(tile, stored: tl.constexpr):
    """The tile in the dtype in which pages of dtype ``stored`` are multiplied."""
    if stored == tl.float8e4nv:
        return tile.to(tl.float16)
    else:
        return tile.to(stored)


@triton.jit
def _unpacked(words):
    """The four e4m3 numbers of every word, the lowest byte first: [1, N, words] int32 -> [1, N, 4 * words] fp16."""
    even = tl.join(_byte(words, 0), _byte(words, 2))
    odd = tl.join(_byte(words, 1), _byte(words, 3))
    return tl.reshape(tl.join(even, odd), (1, words.shape[1], 4 * words.shape[2]))


@triton.jit
def _byte(words, INDEX: tl.constexpr):
    return (words >> 8 * INDEX & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def no_sums(QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """peak [1, QUERIES], mass [1, QUERIES], acc [1, QUERIES, padded(WIDTH)] over no keys."""
    peak = tl.full((1, QUERIES), float("-inf"), tl.float32)
    return peak, tl.zeros((1, QUERIES), tl.float32), tl.zeros((1, QUERIES, padded(WIDTH)), tl.float32)


@triton.jit
def attend(q, key, value, visible, factor, peak, mass, acc):
    """One step of the online softmax: a tile of keys more, of which a query sees the visible ones [1, QUERIES, KEYS].

    peak is the largest score so far, as a power of two; mass is the sum of p = 2^(score - peak), and acc that of p v,
    with p rounded alike in both.
    """
    key = _operand(key, key.dtype)
    if value.dtype == tl.int32:
        value = _unpacked(value)
    scores = tl.dot(q, tl.permute(key, (0, 2, 1)), input_precision="ieee") * factor
    scores = tl.where(visible, scores, float("-inf"))
    peak, base, shrink, _ = rescale(peak, tl.max(scores, 2))
    p = tl.exp2(scores - base[:, :, None]).to(value.dtype)
    ones = tl.full((1, value.shape[1], 16), 1.0, value.dtype)
    mass = mass * shrink + tl.max(tl.dot(p, ones, input_precision="ieee"), 2)  # all columns are alike
    acc = tl.dot(p, value, acc * shrink[:, :, None], input_precision="ieee")
    return peak, mass, acc


@triton.jit
def flat_sums(peak, mass, acc):
    """peak, mass [QUERIES], acc [QUERIES, padded(WIDTH)]: without the axis that is there for the dots."""
    QUERIES: tl.constexpr = acc.shape[1]
    return tl.reshape(peak, (QUERIES,)), tl.reshape(mass, (QUERIES,)), tl.reshape(acc, (QUERIES, acc.shape[2]))


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
    store_tile(out, at, pair < pairs, acc * tl.div_rn(v_scale, mass)[:, None], WIDTH)


@triton.jit
def store_tile(memory, offsets, valid, tile, WIDTH: tl.constexpr):
    """WIDTH columns of each valid row of the tile, to its offset."""
    d = tl.arange(0, padded(WIDTH))
    tl.store(memory + offsets[:, None] + d[None, :], tile, mask=valid[:, None] & (d < WIDTH)[None, :])
