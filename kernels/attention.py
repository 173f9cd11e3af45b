"""Causal grouped-query attention over paged keys and values: softmax(q k^T scale) v, no positional encoding.

Pages: keys and values [num_pages, page_size, kv_heads, head_dim]; token p of the sequence in slot s lies at row
p % page_size of page page_table[s, p // page_size]. Entries of the table beyond a sequence's pages are garbage, and
so is memory beyond its tokens. Query head h reads kv head h // (heads / kv_heads). Both ops write the new tokens'
keys and values into the pages first, and use them as the pages hold them, also in the step that wrote them. Pages may
be fp32, bf16, fp16 or float8_e4m3fn; a page holds k / k_scale and v / v_scale (checkpoint: ``k_scale``, ``v_scale``),
which is of use for fp8, where it saturates at 448.

The context is cut at absolute multiples of KEY_BLOCK tokens and blocks are added in order, so every GEMM has one
shape, and a query's result depends on neither the batch, the chunk it came in, nor the context of others: blocks
beyond its own position add exact zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.kernels.linear import TILE, bmm

KEY_BLOCK = 128
"""Tokens per block of context. Larger wastes work on short contexts, smaller adds passes on long ones."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers by element size: memory as its bits."""


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's keys and values, and how they are scaled."""

    keys: Tensor  # [num_pages, page_size, kv_heads, head_dim]
    values: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0


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
    """The next ``rows`` tokens of each sequence: row j of sequence i stands at position positions[i] + j.

    q [B * rows, heads, head_dim], k, v [B * rows, kv_heads, head_dim] fp32, a sequence's rows side by side (rows
    strided as they like); page_table [num_slots, max_pages] int32; slots, positions [B] int64, slots not repeated
    -> [B * rows, heads, head_dim] fp32, each over the sequence's tokens up to its own.
    """
    batch, heads, width = q.shape
    kv_heads = pages.keys.shape[2]
    if batch == 0:
        return torch.empty_like(q)
    slots = slots.repeat_interleave(rows)
    positions = (positions[:, None] + torch.arange(rows, device=q.device)).flatten()
    _append(pages, k, v, page_table, slots, positions)
    blocks = int(positions.max()) // KEY_BLOCK + 1
    k, v = _gather(pages, page_table, slots, positions, blocks)  # [B, kv_heads, blocks * KEY_BLOCK, width]
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
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, page_table: Tensor, slot: int, start: int, scale: float
) -> Tensor:
    """A chunk of one sequence: row i, at position start + i, over tokens 0..start + i.

    q [L, heads, head_dim], k, v [L, kv_heads, head_dim] fp32 (rows strided as they like) -> [L, heads, head_dim] fp32.
    """
    length, heads, width = q.shape
    kv_heads = pages.keys.shape[2]
    if length == 0:
        return torch.empty_like(q)
    positions = torch.arange(start, start + length, device=q.device)
    _append(pages, k, v, page_table, torch.full_like(positions, slot), positions)
    last, slots = positions[-1:], torch.tensor([slot], device=q.device)
    k, v = _gather(pages, page_table, slots, last, (start + length - 1) // KEY_BLOCK + 1)
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


def _append(pages: Pages, k: Tensor, v: Tensor, page_table: Tensor, slots: Tensor, positions: Tensor) -> None:
    rows = _rows(page_table, slots, positions, pages.keys.shape[1])
    for memory, new, scale in ((pages.keys, k, pages.k_scale), (pages.values, v, pages.v_scale)):
        if scale != 1.0:
            new = new / scale
        if memory.dtype == torch.float8_e4m3fn:
            new = new.clamp(-448, 448)
        # index_copy_ knows no fp8; a view of the bits serves every dtype.
        bits = BITS[memory.element_size()]
        memory.view(bits).view(-1, *memory.shape[2:]).index_copy_(0, rows, new.to(memory.dtype).view(bits))


def _gather(pages: Pages, page_table: Tensor, slots: Tensor, last: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens 0..blocks * KEY_BLOCK - 1 per slot: each [B, kv_heads, tokens, head_dim] fp32.

    Tokens beyond ``last`` [B] read the last one again: what lies there is garbage, and 0 * NaN is not 0.
    """
    kv_heads, device = pages.keys.shape[2], pages.keys.device
    tokens = torch.arange(blocks * KEY_BLOCK, device=device)
    tokens = torch.minimum(tokens, last[:, None])
    rows = _rows(page_table, slots[:, None], tokens, pages.keys.shape[1])
    # One row of the flat view per (sequence, head, token): the result is already in the order the GEMMs want.
    heads = torch.arange(kv_heads, device=device)[:, None]
    index = rows[:, None, :] * kv_heads + heads

    def read(memory: Tensor, scale: float) -> Tensor:
        bits = memory.view(BITS[memory.element_size()]).flatten(0, 2).index_select(0, index.flatten())
        values = bits.view(memory.dtype).view(*index.shape, memory.shape[3]).float()
        return values if scale == 1.0 else values * scale

    return read(pages.keys, pages.k_scale), read(pages.values, pages.v_scale)


def _rows(page_table: Tensor, slots: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Rows of the pages seen as one run of tokens."""
    pages = page_table[slots, positions // page_size].long()
    return pages * page_size + positions % page_size
