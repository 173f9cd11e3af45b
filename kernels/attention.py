"""Causal grouped-query attention over paged keys and values: softmax(q k^T scale) v, no positional encoding.

Pages: keys and values [num_pages, page_size, kv_heads, head_dim]; token p of the sequence in slot s lies at row
p % page_size of page page_table[s, p // page_size]. Entries of the table beyond a sequence's pages are garbage, and
so is memory beyond its tokens. Query head h reads kv head h // (heads / kv_heads). Values are used as the pages hold
them (in the pages' dtype, also in the step that wrote them).

The context is cut at absolute multiples of KEY_BLOCK tokens and blocks are added in order, so every GEMM has one
shape, and a query's result depends on neither the batch, the chunk it came in, nor the context of others: blocks
beyond its own position add exact zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.linear import TILE, bmm

KEY_BLOCK = 128
"""Tokens per block of context. Larger wastes work on short contexts, smaller adds passes on long ones."""


def append(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, slots: Tensor, positions: Tensor
) -> None:
    """Write the rows' keys and values into the pages, in place.

    k, v [T, kv_heads, head_dim]; page_table [num_slots, max_pages] int32; slots, positions [T] int64. Each (slot,
    position) occurs once.
    """
    rows = _rows(page_table, slots, positions, keys.shape[1])
    for pages, new in ((keys, k), (values, v)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, rows, new.to(pages.dtype))


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """One query per sequence, over its tokens 0..position, which are in the pages already.

    q [B, heads, head_dim] fp32; slots, positions [B] int64 -> [B, heads, head_dim] fp32.
    """
    batch, heads, width = q.shape
    kv_heads = keys.shape[2]
    if batch == 0:
        return torch.empty_like(q)
    blocks = int(positions.max()) // KEY_BLOCK + 1
    k, v = _gather(keys, values, page_table, slots, positions, blocks)  # [B, kv_heads, blocks * KEY_BLOCK, width]
    k, v = (t.reshape(-1, KEY_BLOCK, width) for t in (k, v))

    queries = (q * scale).view(batch, kv_heads, 1, heads // kv_heads, width).expand(-1, -1, blocks, -1, -1)
    scores = bmm(queries.reshape(k.shape[0], -1, width), k.transpose(1, 2))
    scores = scores.view(batch, kv_heads, blocks, -1, KEY_BLOCK)
    index = torch.arange(blocks * KEY_BLOCK, device=q.device).view(1, 1, blocks, 1, KEY_BLOCK)
    scores = scores.masked_fill(index > positions.view(-1, 1, 1, 1, 1), -torch.inf)
    # The maximum is exact in any order, so it may be taken over all blocks at once; sums may not.
    p = torch.exp(scores - scores.amax((2, 4), keepdim=True))
    mass = p.sum(-1)
    part = bmm(p.flatten(0, 2), v).view(batch, kv_heads, blocks, -1, width)
    total, out = mass[:, :, 0], part[:, :, 0]
    for block in range(1, blocks):
        total, out = total + mass[:, :, block], out + part[:, :, block]
    return (out / total[..., None]).reshape(batch, heads, width)


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, slot: int, start: int, scale: float
) -> Tensor:
    """A chunk of one sequence: query i, at position start + i, over tokens 0..start + i, in the pages already.

    q [L, heads, head_dim] fp32 -> [L, heads, head_dim] fp32.
    """
    length, heads, width = q.shape
    kv_heads = keys.shape[2]
    if length == 0:
        return torch.empty_like(q)
    last = torch.tensor([start + length - 1], device=q.device)
    slots = torch.tensor([slot], device=q.device)
    k, v = _gather(keys, values, page_table, slots, last, int(last) // KEY_BLOCK + 1)
    grouped = (q * scale).view(length, kv_heads, heads // kv_heads, width)
    out = torch.empty_like(grouped)
    # Strips of queries that share their last key block: no work on blocks that none of them may see.
    first = 0
    while first < length:
        block = (start + first) // KEY_BLOCK
        end = min(length, (block + 1) * KEY_BLOCK - start)
        for head in range(kv_heads):
            visible = slice(0, (block + 1) * KEY_BLOCK)
            out[first:end, head] = _attend(
                grouped[first:end, head], k[0, head, visible], v[0, head, visible], start + first
            )
        first = end
    return out.view(length, heads, width)


def _attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """q [L, G, D] at positions start.., k and v [blocks * KEY_BLOCK, D], the diagonal in the last -> [L, G, D].

    Online softmax: after each block the running sums are rescaled to the new maximum.
    """
    length, group, width = q.shape
    rows = length * group
    tiles = pad(q.reshape(rows, width), (0, 0, 0, -rows % TILE)).view(-1, TILE, width)
    positions = torch.arange(tiles.shape[0] * TILE, device=q.device).view(-1, TILE, 1) // group + start
    peak = q.new_full((tiles.shape[0], TILE, 1), -torch.inf)
    total, out = torch.zeros_like(peak), torch.zeros_like(tiles)
    for first in range(0, k.shape[0], KEY_BLOCK):
        block = slice(first, first + KEY_BLOCK)
        scores = bmm(tiles, k[block].t().expand(tiles.shape[0], -1, -1))
        if block.stop == k.shape[0]:
            hidden = torch.arange(first, block.stop, device=q.device) > positions
            scores = scores.masked_fill(hidden, -torch.inf)
        previous, peak = peak, torch.maximum(peak, scores.amax(-1, keepdim=True))
        p, shrink = torch.exp(scores - peak), torch.exp(previous - peak)
        total = total * shrink + p.sum(-1, keepdim=True)
        out = out * shrink + bmm(p, v[block].expand(tiles.shape[0], -1, -1))
    return (out / total).reshape(-1, width)[:rows].view(length, group, width)


def _gather(
    keys: Tensor, values: Tensor, page_table: Tensor, slots: Tensor, last: Tensor, blocks: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens 0..blocks * KEY_BLOCK - 1 per slot: each [B, kv_heads, tokens, head_dim] fp32.

    Tokens beyond ``last`` [B] read the last one again: what lies there is garbage, and 0 * NaN is not 0.
    """
    kv_heads = keys.shape[2]
    tokens = torch.arange(blocks * KEY_BLOCK, device=keys.device)
    tokens = torch.minimum(tokens, last[:, None])
    rows = _rows(page_table, slots[:, None], tokens, keys.shape[1])
    # One row of the flat view per (sequence, head, token): the result is already in the order the GEMMs want.
    heads = torch.arange(kv_heads, device=keys.device)[:, None]
    index = rows[:, None, :] * kv_heads + heads
    shape = (*index.shape, keys.shape[3])
    k, v = (pages.flatten(0, 2).index_select(0, index.flatten()).view(shape).float() for pages in (keys, values))
    return k, v


def _rows(page_table: Tensor, slots: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Rows of the pages seen as one run of tokens."""
    pages = page_table[slots, positions // page_size].long()
    return pages * page_size + positions % page_size
