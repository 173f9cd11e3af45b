"""Attention over paged keys and values; see ``kernels/attention.py`` for the contracts."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.attention import Pages
from headrace.kernels.native.library import Op, Pool
from headrace.kernels.native.linear import FORMATS

COMMON = "qqqqqqqqqqqqqqqqqdddqqq"
DECODE_ATTENTION = Op("decode_attention", COMMON + "qqqq")
PREFILL_ATTENTION = Op("prefill_attention", COMMON + "qq")


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
    *,
    pool: Pool,
) -> Tensor:
    """As the reference's."""
    y = pool.empty(*q.shape)
    if q.shape[0]:
        slots, positions = pool.contiguous(slots), pool.contiguous(positions)
        DECODE_ATTENTION(
            pool,
            *_common(q, k, v, pages, page_table, scale, y, pool),
            slots.data_ptr(),
            positions.data_ptr(),
            slots.shape[0],
            rows,
        )
    return y


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    page_table: Tensor,
    slot: int,
    start: int,
    scale: float,
    *,
    pool: Pool,
) -> Tensor:
    """As the reference's."""
    y = pool.empty(*q.shape)
    if q.shape[0]:
        PREFILL_ATTENTION(pool, *_common(q, k, v, pages, page_table, scale, y, pool), slot, start)
    return y


def _common(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, page_table: Tensor, scale: float, y: Tensor, pool: Pool
) -> tuple[float, ...]:
    """AttentionArgs of ops.h."""
    rows, heads, width = q.shape
    _, page_size, kv_heads, _ = pages.keys.shape
    return (
        pool.rows(q),
        pool.rows(k),
        pool.rows(v),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        rows,
        heads,
        kv_heads,
        width,
        pages.keys.data_ptr(),
        pages.values.data_ptr(),
        FORMATS[pages.keys.dtype],
        page_size,
        pages.k_scale,
        pages.v_scale,
        scale,
        page_table.data_ptr(),
        page_table.stride(0),
        y.data_ptr(),
    )
