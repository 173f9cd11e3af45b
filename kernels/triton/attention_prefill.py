"""Attention of a prompt's chunk: its keys and values go to the pages, then tiles of queries walk the keys from 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.attention import Pages
from headrace.kernels.triton.attention_softmax import (
    Tiles,
    attend,
    checked,
    indices,
    keys_shape,
    last_axis,
    load_keys,
    load_queries,
    make_tiles,
    no_sums,
    page_rows,
    score_factor,
    store_means,
    write_rows,
)
from headrace.kernels.triton.common import cdiv

APPENDED = 16
"""Tokens that one program writes to the pages: small, for many programs; a row is a whole transaction anyway."""


def prefill_tiles(pages: Pages, arch: int) -> Tiles:
    """One shape for all chunks: twice the queries or the keys spill registers, on one Triton or another."""
    return make_tiles(64, 32 if pages.keys.dtype == torch.float8_e4m3fn else 64, pages, arch)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, page_table: Tensor, slot: int, start: int, scale: float
) -> Tensor:
    """See ``headrace.kernels.attention``. Raises ValueError for pages that ``attention_softmax.checked`` refuses."""
    length, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if length == 0:
        return out
    _, page_size, kv_heads, _ = pages.keys.shape
    tiles = prefill_tiles(pages, checked(pages))
    group = heads // kv_heads
    where = (page_table[slot], start, length)
    strides = (q.stride()[:2], k.stride()[:2], v.stride()[:2])
    _append[cdiv(length, APPENDED), kv_heads](
        *(k, v, pages.keys, pages.values, *where, *strides[1:], pages.k_scale, pages.v_scale),
        WIDTH=width,
        PAGE=page_size,
        TOKENS=APPENDED,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
    _prefill[cdiv(length * group, tiles.pairs), kv_heads](
        *(q, out, pages.keys, pages.values, *where, strides[0], score_factor(scale, pages), pages.v_scale),
        GROUP=group,
        WIDTH=width,
        PAGE=page_size,
        PAIRS=tiles.pairs,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=False,
    )
    return out


@triton.jit(do_not_specialize=["start", "length"])
def _append(
    k,
    v,
    keys,
    values,
    table,
    start,
    length,
    k_strides,
    v_strides,
    k_scale,
    v_scale,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (TOKENS tokens of the chunk, kv head)."""
    head, row_width = tl.program_id(1), tl.num_programs(1) * WIDTH
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = page_rows(table, start + token, start + length - 1, PAGE)
    k, v = k + head * k_strides[1], v + head * v_strides[1]
    keys, values = keys + head * WIDTH, values + head * WIDTH
    write_rows(k, token, k_strides[0], keys, rows, row_width, token < length, k_scale, WIDTH)
    write_rows(v, token, v_strides[0], values, rows, row_width, token < length, v_scale, WIDTH)


@triton.jit(do_not_specialize=["start", "length"])
def _prefill(
    q,
    out,
    keys,
    values,
    table,
    start,
    length,
    q_strides,
    factor,
    v_scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (PAIRS pairs of (token, head of the group), kv head), over the keys up to the tile's last token."""
    head, row_width = tl.program_id(1), tl.num_programs(1) * WIDTH
    # The tiles with the longest context start first.
    pair = (tl.num_programs(0) - 1 - tl.program_id(0)) * PAIRS + indices(QUERIES)
    offsets = pair // GROUP * q_strides[0] + (head * GROUP + pair % GROUP) * q_strides[1]
    queries = load_queries(q, offsets, pair < length * GROUP, keys, WIDTH)
    own = start + tl.minimum(pair // GROUP, length - 1)
    last = tl.max(own)
    keys, values = keys + head * WIDTH, values + head * WIDTH
    peak, mass, acc = no_sums(QUERIES, WIDTH)
    inside = indices(keys_shape(QUERIES, KEYS))
    rows = page_rows(table, inside, last, PAGE)
    for first in range(0, last + 1, KEYS):
        key, value = load_keys(keys, values, rows, row_width, first + inside <= last, WIDTH)
        visible = tl.expand_dims(inside, -2) <= last_axis(own - first)
        # Where the next tile lies is looked up one step ahead, so that its loads wait for nothing.
        rows = page_rows(table, first + KEYS + inside, last, PAGE)
        peak, mass, acc = attend(queries, key, value, visible, factor, peak, mass, acc)
    out += head * GROUP * WIDTH
    store_means(out, row_width * GROUP, pair, length * GROUP, (peak, mass, acc), v_scale, GROUP, WIDTH)
