"""Routing in one launch: pick each row's experts, then group the (row, expert) pairs by expert into 16-row tiles.

A program picks for one row: the row of scores stays in registers, and ``top_k`` rounds take the largest left. Rounds
compare integers ordered as the floats are, so that equal values, infinities and NaN have one order too: whatever a row
holds, its picks are ``top_k`` different experts. The last program to finish lays the pairs out by expert. It reads the
picks that the others wrote as their result, so that nothing else moves through memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.moe import Routes, Routing
from headrace.kernels.triton.common import last_to_arrive, next_power_of_2
from headrace.kernels.triton.scratch import counters

TILE = 16  # rows of a tile: M of mma.sync
MOST_EXPERTS = 1024  # a row's scores lie in its program's registers

_LOWEST = tl.constexpr(-(2**31))  # below every score's key: taken, or past the last expert
_TILE = tl.constexpr(TILE)
_CHUNK = tl.constexpr(128)  # pairs that are grouped at a time, one a thread; each is compared with all of them


@dataclass(frozen=True, slots=True)
class Plan:
    """The pairs by expert. Pair p is row p // top_k with its expert number p % top_k."""

    order: Tensor  # [T * top_k] int32: pairs sorted by expert, then by row
    tiles: Tensor  # [3, slots] int32: each tile's expert, its first place in ``order``, its pairs (0: slot unused)

    @property
    def slots(self) -> int:
        """Most tiles there can be."""
        return self.tiles.shape[1]


def most_tiles(rows: int, top_k: int, experts: int) -> int:
    """Most 16-row tiles that ``rows`` rows with ``top_k`` experts each can need: sum of ceil(pairs of expert / 16)."""
    pairs = rows * top_k
    return (pairs + (TILE - 1) * min(pairs, experts)) // TILE


def route(logits: Tensor, bias: Tensor, routing: Routing) -> Routes:
    """See ``headrace.kernels.moe.route``. Logits' columns are contiguous. Raises ValueError beyond MOST_EXPERTS."""
    rows, experts = logits.shape
    top_k, device = routing.top_k, logits.device
    if experts > MOST_EXPERTS:
        raise ValueError(f"{experts} experts: at most {MOST_EXPERTS} are supported")
    picked = torch.empty(rows, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    slots = most_tiles(rows, top_k, experts)
    plan = Plan(
        torch.empty(rows * top_k, dtype=torch.int32, device=device),
        torch.empty(3, slots, dtype=torch.int32, device=device),
    )
    if rows == 0:
        return Routes(picked, weights, plan)
    width = max(next_power_of_2(experts), 128)
    _route[(rows,)](
        logits,
        logits.stride(0),
        bias,
        picked,
        weights,
        plan.order,
        plan.tiles,
        counters(device, 1),
        rows,
        slots,
        EXPERTS=experts,
        TOP_K=top_k,
        GROUPS=routing.groups,
        TOPK_GROUPS=routing.topk_groups,
        NORMALISE=routing.normalise,
        SCALE=routing.scale,
        WIDTH=width,
        PICKS=next_power_of_2(top_k),
        num_warps=4,  # 4 scores a thread at 512 experts; more warps would only wait for each other in every round
        num_stages=1,
        enable_fp_fusion=False,
    )
    return Routes(picked, weights, plan)


@triton.jit
def _sigmoid(x):
    return tl.math.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _key(value):
    """int32 that orders as fp32 values do; NaN lies beyond the infinity of its sign."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST + 1)


@triton.jit
def _value(key):
    """The fp32 value of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_of(keys, key, ids):
    """The lowest id with this key."""
    return tl.min(tl.where(keys == key, ids, 0x7FFFFFFF), 0)


@triton.jit
def _keep_best_groups(keys, ids, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr):
    """Keys with all experts outside the best groups at minus infinity's; a group is worth the sum of its two best."""
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    group_of = ids // (EXPERTS // GROUPS)
    groups = tl.arange(0, PADDED)
    worths = tl.full([PADDED], _LOWEST, tl.int32)
    for group in range(GROUPS):
        inside = tl.where(group_of == group, keys, _LOWEST)
        best = tl.max(inside, 0)
        second = tl.max(tl.where(ids == _first_of(inside, best, ids), _LOWEST, inside), 0)
        worths = tl.where(groups == group, _key(_value(best) + _value(second)), worths)
    kept = ids < 0
    for _ in range(TOPK_GROUPS):
        group = _first_of(worths, tl.max(worths, 0), groups)
        kept = kept | (group_of == group)
        worths = tl.where(groups == group, _LOWEST, worths)
    return tl.where(kept | (ids >= EXPERTS), keys, _key(tl.full(keys.shape, float("-inf"), tl.float32)))


@triton.jit
def _experts_of(picked, pair, pairs):
    """int32 experts of pairs; 0 past the last one."""
    return tl.load(picked + pair, mask=pair < pairs, other=0).to(tl.int32)


@triton.jit
def _group(picked, order, tiles, rows, slots, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """Count each expert's pairs, cut them into tiles, and write the pairs in order.

    The stages of the loops over chunks are what hides the loads behind little work (counting) and more (ordering);
    with a third stage the ordering spills on Triton 3.6.
    """
    pairs = rows * TOP_K
    ids = tl.arange(0, WIDTH)
    each = tl.arange(0, _CHUNK)
    count = tl.zeros([WIDTH], tl.int32)
    for start in tl.range(0, pairs, _CHUNK, num_stages=4):
        count += tl.histogram(_experts_of(picked, start + each, pairs), WIDTH)
    # Nothing is masked in a histogram, which would branch: what is past the last pair was counted as expert 0's.
    count -= tl.where(ids == 0, tl.cdiv(pairs, _CHUNK) * _CHUNK - pairs, 0)
    first = tl.cumsum(count, 0) - count
    needed = (count + _TILE - 1) // _TILE
    slot = tl.cumsum(needed, 0) - needed
    for tile in range(0, tl.cdiv(rows, _TILE)):
        here = tile < needed
        tl.store(tiles + slot + tile, ids, mask=here)
        tl.store(tiles + slots + slot + tile, first + tile * _TILE, mask=here)
        tl.store(tiles + 2 * slots + slot + tile, tl.minimum(count - tile * _TILE, _TILE), mask=here)
    used = tl.sum(needed, 0)
    for start in range(0, slots, WIDTH):
        unused = start + ids
        tl.store(tiles + 2 * slots + unused, tl.zeros([WIDTH], tl.int32), mask=(unused >= used) & (unused < slots))
    for start in tl.range(0, pairs, _CHUNK, num_stages=2):
        pair = start + each
        expert = _experts_of(picked, pair, pairs)
        before = (expert[:, None] == expert[None, :]) & (each[:, None] < each[None, :])
        place = tl.gather(first, expert, 0) + tl.sum(before.to(tl.int32), 0)
        tl.store(order + place, pair, mask=pair < pairs)
        first += tl.histogram(expert, WIDTH)


@triton.jit(do_not_specialize=["rows", "slots"])
def _route(
    logits,
    row_stride,
    bias,
    picked,
    weights,
    order,
    tiles,
    counter,
    rows,
    slots,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    PICKS: tl.constexpr,
):
    row = tl.program_id(0)
    ids = tl.arange(0, WIDTH)
    real = ids < EXPERTS
    logits += row.to(tl.int64) * row_stride
    score = _sigmoid(tl.load(logits + ids, mask=real, other=0.0))
    keys = tl.where(real, _key(score + tl.load(bias + ids, mask=real, other=0.0)), _LOWEST)
    if GROUPS > 1:
        keys = _keep_best_groups(keys, ids, EXPERTS, GROUPS, TOPK_GROUPS)
    pick = tl.arange(0, PICKS)
    experts = tl.zeros([PICKS], tl.int32)
    for j in range(TOP_K):
        expert = _first_of(keys, tl.max(keys, 0), ids)
        experts = tl.where(pick == j, expert, experts)
        keys = tl.where(ids == expert, _LOWEST, keys)
    wanted = pick < TOP_K
    weight = tl.where(wanted, _sigmoid(tl.load(logits + experts)), 0.0)
    if NORMALISE:
        weight = tl.math.div_rn(weight, tl.sum(weight, 0) + 1e-20)
    tl.store(picked + row.to(tl.int64) * TOP_K + pick, experts.to(tl.int64), mask=wanted)
    tl.store(weights + row.to(tl.int64) * TOP_K + pick, weight * SCALE, mask=wanted)
    if last_to_arrive(counter, rows):
        _group(picked, order, tiles, rows, slots, TOP_K, WIDTH)
