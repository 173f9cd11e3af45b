"""Attention of the next tokens of many sequences: append, attend and add up, in one launch.

The context is cut into segments of a fixed number of tokens, dealt round robin to PARTS programs per (sequence, kv
head). A part walks its segments in order; the last part of every FAN to end adds their sums up in order, and the last
of those adds up the groups'. All three numbers are constants, so the order of a row's sums follows from its own
position, whatever else is decoded: a segment, part or group in which it sees nothing (later draft rows have them) has
weight 0 for it.
"""

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
    padded,
    page_rows,
    rescale,
    score_factor,
    store_means,
    store_tile,
    write_rows,
)
from headrace.kernels.triton.common import cdiv, last_to_arrive, next_power_of_2
from headrace.kernels.triton.scratch import counters

SEGMENT_BYTES = 1024
"""Bytes of one channel that a part takes at a time: 512 tokens of bf16. With 16 heads of 128, one row leaves 8 KiB of
sums, written and read again, for 256 KiB of keys and values: 6 %."""

PARTS = 64
"""Programs per (sequence, kv head), at most: with two kv heads one long sequence fills the SMs of an H100."""

FAN = 8
"""Parts whose sums one program adds up. 64 at once would be half a megabyte to read for a single SM, 5 us; in two
levels it is an eighth at a time, read by eight."""

MOST_PAIRS = 64
"""Pairs of (new row, query head) in a tile: four warps of 16. More rows take another launch."""


def decode_tiles(pairs: int, pages: Pages, arch: int) -> Tiles:
    """For ``pairs`` of (new row, query head) per kv head."""
    return make_tiles(max(16, next_power_of_2(pairs)), 64, pages, arch)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    rows: int = 1,
) -> Tensor:
    """See ``headrace.kernels.attention``. Raises ValueError for pages that ``attention_softmax.checked`` refuses."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    together = max(1, MOST_PAIRS * pages.keys.shape[2] // q.shape[1])
    for first in range(0, rows if q.shape[0] else 0, together):
        now = min(together, rows - first)
        _decode_rows(q, k, v, out, pages, page_table, slots, positions, scale, rows, first, now)
    return out


def _decode_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    pages: Pages,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    rows: int,
    first: int,
    now: int,
) -> None:
    """Rows first .. first + now - 1 of every sequence's ``rows``."""
    total, heads, width = q.shape
    _, page_size, kv_heads, _ = pages.keys.shape
    sequences, group = total // rows, heads // kv_heads
    tiles = decode_tiles(group * now, pages, checked(pages))
    segment = SEGMENT_BYTES // pages.keys.itemsize
    # No sequence is longer than its row of the page table.
    parts = min(PARTS, cdiv(page_table.shape[1] * page_size, segment))
    groups = cdiv(parts, FAN)
    partial = q.new_empty(sequences, kv_heads, parts + groups, group * now, width)
    stats = q.new_empty(sequences, kv_heads, parts + groups, 2, group * now)
    arrived = counters(q.device, sequences * kv_heads * (groups + 1))
    _decode[parts, kv_heads, sequences](
        *(q, k, v, out, pages.keys, pages.values, page_table, slots, positions, partial, stats, arrived),
        *(q.stride()[:2], k.stride()[:2], v.stride()[:2], page_table.stride(0), rows, first),
        *(score_factor(scale, pages), pages.k_scale, pages.v_scale),
        ROWS=now,
        GROUP=group,
        WIDTH=width,
        PAGE=page_size,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        SEGMENT=segment,
        PARTS=PARTS,
        FAN=FAN,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # Left alone, ptxas aims at a third CTA, which shared memory does not allow, and spills to get there; told that
        # it need not, it keeps more than it has of the largest tile.
        maxnreg=255 if len(tiles.queries) == 1 else None,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["rows", "skipped"])
def _decode(
    q,
    k,
    v,
    out,
    keys,
    values,
    page_table,
    slots,
    positions,
    partial,
    stats,
    arrived,
    q_strides,
    k_strides,
    v_strides,
    table_stride,
    rows,
    skipped,
    factor,
    k_scale,
    v_scale,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PARTS: tl.constexpr,
    FAN: tl.constexpr,
):
    """Program (part, kv head, sequence), for ROWS of the sequence's rows, from row ``skipped`` on."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_width = tl.num_programs(1) * WIDTH
    first = tl.load(positions + sequence).to(tl.int32) + skipped
    last = first + ROWS - 1
    if part > last // SEGMENT:
        return
    row, table = sequence * rows + skipped, page_table + tl.load(slots + sequence) * table_stride
    keys, values = keys + head * WIDTH, values + head * WIDTH
    if _is_part_of(part, first, SEGMENT, PARTS) or _is_part_of(part, last, SEGMENT, PARTS):
        # Who will read a new token writes it: nobody else needs it in this launch.
        new = tl.arange(0, triton.next_power_of_2(ROWS))
        at = page_rows(table, first + new, last, PAGE)
        mine = (new < ROWS) & _is_part_of(part, first + new, SEGMENT, PARTS)
        k, v = k + row * k_strides[0] + head * k_strides[1], v + row * v_strides[0] + head * v_strides[1]
        write_rows(k, new, k_strides[0], keys, at, row_width, mine, k_scale, WIDTH)
        write_rows(v, new, v_strides[0], values, at, row_width, mine, v_scale, WIDTH)
        tl.debug_barrier()
    pair = indices(QUERIES)
    q += row * q_strides[0] + head * GROUP * q_strides[1]
    offsets = pair // GROUP * q_strides[0] + pair % GROUP * q_strides[1]
    queries = load_queries(q, offsets, pair < ROWS * GROUP, keys, WIDTH)
    own = tl.minimum(first + pair // GROUP, last)
    pages = keys, values, table, row_width
    sums = _walk(queries, pages, part, own, last, factor, WIDTH, PAGE, QUERIES, KEYS, SEGMENT, PARTS)
    out += (row * tl.num_programs(1) + head) * GROUP * WIDTH
    place, parts = sequence * tl.num_programs(1) + head, tl.minimum(last // SEGMENT + 1, PARTS)
    _finish(out, partial, stats, arrived, place, part, parts, sums, v_scale, ROWS * GROUP, GROUP, WIDTH, QUERIES, FAN)


@triton.jit
def _is_part_of(part, token, SEGMENT: tl.constexpr, PARTS: tl.constexpr):
    """Whether the part walks the token's segment."""
    return token // SEGMENT % PARTS == part


@triton.jit
def _walk(
    queries,
    pages,
    part,
    own,
    last,
    factor,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The softmax's sums over the part's segments, in order."""
    keys, values, table, row_width = pages
    STEPS: tl.constexpr = SEGMENT // KEYS
    TILE: tl.constexpr = keys_shape(QUERIES, KEYS)
    BETWEEN: tl.constexpr = (PARTS - 1) * SEGMENT  # tokens of other parts between two segments
    steps = ((last // SEGMENT - part) // PARTS + 1) * STEPS
    if _is_part_of(part, last, SEGMENT, PARTS):  # of the last segment, only as much as there is
        steps -= (SEGMENT - 1 - last % SEGMENT) // KEYS
    peak, mass, acc = no_sums(QUERIES, WIDTH)
    first, inside = part * SEGMENT, indices(TILE)
    rows = page_rows(table, first + inside, last, PAGE)
    for step in range(1, steps + 1):
        key, value = load_keys(keys, values, rows, row_width, first + inside <= last, WIDTH)
        visible = tl.expand_dims(inside, -2) <= last_axis(own - first)
        # Where the next tile lies is looked up one step ahead, so that its loads wait for nothing.
        first = part * SEGMENT + step * KEYS + step // STEPS * BETWEEN
        rows = page_rows(table, first + inside, last, PAGE)
        peak, mass, acc = attend(queries, key, value, visible, factor, peak, mass, acc)
    return peak, mass, acc


@triton.jit
def _finish(
    out,
    partial,
    stats,
    arrived,
    place,
    part,
    parts,
    sums,
    v_scale,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    FAN: tl.constexpr,
):
    """Leave the part's sums to whom ends last: of its group of parts, then of the groups.

    Scratch per (sequence, kv head): the parts' sums, then the groups'; a counter per group, then one for all.
    """
    STEP: tl.constexpr = 16 if PAIRS <= 16 else 8  # pairs to add up at a time: the walk of more leaves less registers
    bound, bound_groups = tl.num_programs(0), tl.cdiv(tl.num_programs(0), FAN)
    arrived += place * (bound_groups + 1)
    place *= bound + bound_groups
    group, groups = part // FAN, tl.cdiv(parts, FAN)
    row_stride = tl.num_programs(1) * GROUP * WIDTH
    _put_sums(partial, stats, place + part, indices(QUERIES), sums, PAIRS, WIDTH)
    first, count = place + group * FAN, tl.minimum(parts - group * FAN, FAN)
    mine = last_to_arrive(arrived + group, count)
    levels = tl.where(groups > 1, 2, 1)
    for level in range(0, levels):
        if mine:
            for some in range(0, PAIRS, STEP):
                pair = some + tl.arange(0, STEP)
                total = _add_sums(partial, stats, first, count, pair, PAIRS, WIDTH, FAN)
                if level == levels - 1:
                    store_means(out, row_stride, pair, PAIRS, total, v_scale, GROUP, WIDTH)
                else:
                    _put_sums(partial, stats, place + bound + group, pair, total, PAIRS, WIDTH)
            if level < levels - 1:
                mine = last_to_arrive(arrived + bound_groups, groups)
                first, count = place + bound, groups


@triton.jit
def _put_sums(partial, stats, place, pair, sums, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of the pairs to ``place`` of the scratch."""
    peak, mass, acc = sums
    stats += place * 2 * PAIRS + pair
    tl.store(stats, peak, mask=pair < PAIRS)
    tl.store(stats + PAIRS, mass, mask=pair < PAIRS)
    store_tile(partial, (place * PAIRS + pair) * WIDTH, pair < PAIRS, acc, WIDTH)


@triton.jit
def _add_sums(partial, stats, place, count, pair, PAIRS: tl.constexpr, WIDTH: tl.constexpr, FAN: tl.constexpr):
    """The pairs' sums at place .. place + count - 1, at most FAN, added in order."""
    d = tl.arange(0, padded(WIDTH))
    peak = tl.full(pair.shape, float("-inf"), tl.float32)
    mass = tl.zeros(pair.shape, tl.float32)
    acc = tl.zeros((pair.shape[0], d.shape[0]), tl.float32)
    for index in tl.static_range(FAN):  # unrolled, so that the loads go out together
        here = pair < tl.where(index < count, PAIRS, 0)
        row = (place + index) * PAIRS + pair
        at = stats + (place + index) * 2 * PAIRS + pair
        more_peak = tl.load(at, mask=here, other=float("-inf"))
        more_mass = tl.load(at + PAIRS, mask=here, other=0.0)
        mask = here[:, None] & (d < WIDTH)[None, :]
        more = tl.load(partial + (row * WIDTH)[:, None] + d[None, :], mask=mask, other=0.0)
        peak, _, shrink, weight = rescale(peak, more_peak)
        mass = mass * shrink + more_mass * weight
        acc = acc * shrink[:, None] + more * weight[:, None]
    return peak, mass, acc
