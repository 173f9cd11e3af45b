"""Routed experts: every touched expert's weights are read once, in one sequential stream per program.

A program takes one 16-row tile of one expert and a slice of the inner dimension: per 16 inner units it multiplies by
their rows of ``up``, squares, and multiplies by their columns of ``down``, so no program needs what another computed.
The slices' partial sums are added in order by ``_combine``: no atomics, and a row's bits depend on nothing beside it.
Experts too wide for that (the result's 16 rows must fit into registers) take two launches, ``up`` and ``down``.

Every product has 16 rows per tile, so its instruction is mma.sync m16n8k16 on every architecture (wgmma and tcgen05
begin at 64 rows) and for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.moe import Matrices, Routes
from headrace.kernels.triton.common import cdiv, next_power_of_2
from headrace.kernels.triton.routing import TILE, Plan
from headrace.kernels.triton.target import architecture

UNIT = 16  # inner units that are stored together: K of mma.sync
CHUNK = 64  # inner units that a wide expert's program computes or adds up at a time
PLAIN = "plain"  # weights stored as what they are multiplied as; formats with scales will stand beside it

_TILE = tl.constexpr(TILE)
_UNIT = tl.constexpr(UNIT)
_CHUNK = tl.constexpr(CHUNK)
_PLAIN = tl.constexpr(PLAIN)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts in the order in which they are read.

    tiles [E, ceil(I / 16), 2, 16, K] bf16 or fp32: of 16 inner units first the rows of ``up``, then the columns of
    ``down``. Units past I are zero.
    """

    tiles: Tensor


def pack_experts(up: Matrices, down: Matrices) -> PackedExperts:
    """See ``headrace.kernels.moe.pack_experts``. fp16 becomes fp32. Beside the result only one expert is copied."""
    first = up[0]
    inner, width = first.shape
    dtype = torch.bfloat16 if up.dtype == down.dtype == torch.bfloat16 else torch.float32
    units = -(-inner // UNIT)
    tiles = torch.empty(len(up), units, 2, UNIT, width, dtype=dtype, device=first.device)
    padded = torch.zeros(2, units * UNIT, width, dtype=dtype, device=first.device)
    for expert in range(len(up)):
        padded[0, :inner] = up[expert] if expert else first
        padded[1, :inner] = down[expert].t()
        tiles[expert] = padded.view(2, units, UNIT, width).transpose(0, 1)
    return PackedExperts(tiles)


@dataclass(frozen=True, slots=True)
class ExpertsParameters:
    """How the experts are launched."""

    fused: bool  # up and down in one launch
    splits: int  # slices of the inner dimension, each with its own partial sum
    groups: int  # a pair's sum: first over the slices of each group, in order, then over the groups
    programs: int  # a tile's programs: one per slice, or one per group, which then adds up its slices itself
    parts: int  # equal parts of K that the product with ``up`` adds up side by side, in different warps
    num_warps: int
    num_stages: int


@cache
def parameters(
    pairs: int, top_k: int, experts: int, units: int, width: int, itemsize: int, arch: int
) -> ExpertsParameters:
    """Launch parameters. Only ``programs`` follows the batch, and both of its values add in the same order."""
    # One token's tiles should fill the device once, in one wave. More than 8 slices cost more in partial sums than
    # they bring. An even number falls into two groups.
    splits = max(1, min(_multiprocessors(arch) // top_k, units, 8) // 2 * 2)
    groups = 2 if splits > 2 else 1
    # A slice's partial sums are 8 bytes per pair and column, written and read; with more than 2 pairs per expert that
    # begins to show beside the weights (1 % at inner size 2688), and there are tiles enough to fill the device.
    programs = groups if pairs > 2 * experts else splits
    # 16 rows of 2048 bytes are 32 KB: with the 64 KB of one step's weights that is what the smallest SM holds, and
    # 16 x 1024 sums are 64 registers a thread.
    fused = next_power_of_2(width) * itemsize <= 2048
    if arch in (90, 100, 103):
        # 8 parts: the shortest chain from weights to sums. 3 stages: two steps' weights, 128 KB, in flight.
        return ExpertsParameters(fused, splits, groups, programs, parts=8, num_warps=8, num_stages=3)
    # Two parts need 2 KB less for adding up, and so fit 3 stages into sm_80's shared memory, 2 into all others'.
    return ExpertsParameters(fused, splits, groups, programs, parts=2, num_warps=8, num_stages=3 if arch == 80 else 2)


def _multiprocessors(arch: int) -> int:
    """SMs of the architecture's largest card: A100, H100, B200, RTX PRO 6000. Not the device's own: bits follow it."""
    return {80: 108, 90: 132, 100: 148, 103: 148, 120: 188}.get(arch, 128)


def experts(x: Tensor, packed: PackedExperts, routes: Routes, *, residual: Tensor | None = None) -> Tensor:
    """See ``headrace.kernels.moe.experts``. ``routes`` come from this backend's ``route``."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out
    tiles, plan, top_k = packed.tiles, routes.plan, routes.experts.shape[1]
    if not isinstance(plan, Plan):
        raise TypeError(f"routes without this backend's plan: {plan!r}")
    count, units = tiles.shape[:2]
    pairs = rows * top_k
    chosen = parameters(pairs, top_k, count, units, width, tiles.element_size(), architecture(x.device))
    sums = torch.empty(pairs, chosen.programs, width, dtype=torch.float32, device=x.device)
    launch = _launch_fused if chosen.fused else _launch_wide
    launch(x, tiles, plan, top_k, sums, chosen)
    block = 128  # one column a thread: all of a pair's loads fit into registers, so their latencies overlap
    _combine[(rows, cdiv(width, block))](
        sums,
        routes.weights,
        routes.weights.stride(0),
        residual,
        0 if residual is None else residual.stride(0),
        out,
        K=width,
        TOP_K=top_k,
        PROGRAMS=chosen.programs,
        GROUPS=chosen.groups,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


def _launch_fused(x: Tensor, tiles: Tensor, plan: Plan, top_k: int, sums: Tensor, chosen: ExpertsParameters) -> None:
    width = x.shape[1]
    _fused[(plan.slots * chosen.programs,)](
        x,
        x.stride(0),
        tiles,
        plan.order,
        plan.tiles,
        sums,
        plan.slots,
        K=width,
        UNITS=tiles.shape[1],
        TOP_K=top_k,
        SPLITS=chosen.splits,
        PROGRAMS=chosen.programs,
        WIDTH=max(next_power_of_2(width), 16 * chosen.parts),
        PARTS=chosen.parts,
        FORMAT=PLAIN,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=False,
    )


def _launch_wide(x: Tensor, tiles: Tensor, plan: Plan, top_k: int, sums: Tensor, chosen: ExpertsParameters) -> None:
    width, units = x.shape[1], tiles.shape[1]
    chunks, blocks = cdiv(units * UNIT, CHUNK), cdiv(width, 128)
    hidden = torch.empty(sums.shape[0], units * UNIT, dtype=tiles.dtype, device=x.device)
    _up[(plan.slots * chunks,)](
        x,
        x.stride(0),
        tiles,
        plan.order,
        plan.tiles,
        hidden,
        plan.slots,
        K=width,
        UNITS=units,
        TOP_K=top_k,
        BLOCK_K=128,
        FORMAT=PLAIN,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    _down[(plan.slots * chosen.programs * blocks,)](
        hidden,
        tiles,
        plan.order,
        plan.tiles,
        sums,
        plan.slots,
        K=width,
        UNITS=units,
        SPLITS=chosen.splits,
        PROGRAMS=chosen.programs,
        BLOCK_N=128,
        FORMAT=PLAIN,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )


@triton.jit
def _load_weights(tiles, offsets, inside, FORMAT: tl.constexpr):
    """Weights as what they are multiplied as, zero outside; ``inside`` is None where nothing can be outside.

    They are read once: L2 shall rather keep the partial sums.
    """
    tl.static_assert(FORMAT == _PLAIN)
    if inside is None:
        return tl.load(tiles + offsets, eviction_policy="evict_first")
    else:
        return tl.load(tiles + offsets, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_tile(slot, order, tiles, slots):
    """A slot's expert, its pairs [16], and which of the 16 there are; no pair in an unused slot."""
    count = tl.load(tiles + 2 * slots + slot)
    used = count > 0
    expert = tl.load(tiles + slot, mask=used, other=0).to(tl.int64)
    first = tl.load(tiles + slots + slot, mask=used, other=0)
    row = tl.arange(0, _TILE)
    real = row < count
    return expert, tl.load(order + first + row, mask=real, other=0), real, used


@triton.jit
def _relu2(x):
    x = tl.maximum(x, 0.0)
    return x * x


@triton.jit(do_not_specialize=["slots"])
def _fused(
    x,
    x_stride,
    packed,
    order,
    tiles,
    sums,  # [pairs, PROGRAMS, K] fp32
    slots,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    PER: tl.constexpr = SPLITS // PROGRAMS
    program = tl.program_id(0) % PROGRAMS
    expert, pair, real, used = _load_tile(tl.program_id(0) // PROGRAMS, order, tiles, slots)
    if not used:
        return
    dtype: tl.constexpr = packed.dtype.element_ty
    unit = tl.arange(0, _UNIT)
    column = tl.arange(0, WIDTH)[None, :]
    # K in PARTS parts along the first axis: [PARTS, 16 rows, WIDTH / PARTS] @ [PARTS, WIDTH / PARTS, 16 units]
    part = tl.arange(0, PARTS)[:, None, None] * (WIDTH // PARTS)
    along = part + tl.arange(0, WIDTH // PARTS)[None, None, :]
    down_part = part + tl.arange(0, WIDTH // PARTS)[None, :, None]
    token = (pair // TOP_K).to(tl.int64)[None, :, None]
    rows = tl.load(x + token * x_stride + along, mask=real[None, :, None] & (along < K), other=0.0).to(dtype)
    out = sums + (pair.to(tl.int64) * PROGRAMS + program)[:, None] * K + column
    stored = real[:, None] & (column < K)
    # Nothing is hoisted out of this loop: the addresses of ``out`` would take the registers that the sums need.
    for split in tl.range(program * PER, (program + 1) * PER, disable_licm=True):
        first = split * UNITS // SPLITS
        last = (split + 1) * UNITS // SPLITS
        step = packed + (expert * UNITS + first) * (2 * _UNIT * K)
        acc = tl.zeros([_TILE, WIDTH], tl.float32)
        for _ in range(first, last):
            up = _load_weights(step, unit[None, None, :] * K + down_part, None if WIDTH == K else down_part < K, FORMAT)
            inner = _relu2(tl.sum(tl.dot(rows, up, input_precision="ieee"), 0)).to(dtype)
            down = _load_weights(
                step + _UNIT * K, unit[:, None] * K + column, None if WIDTH == K else column < K, FORMAT
            )
            acc = tl.dot(inner, down, acc, input_precision="ieee")
            step += 2 * _UNIT * K
        if split > program * PER:
            tl.debug_barrier()  # the load below need not be laid out over the threads as the store was
            acc = tl.load(out, mask=stored, other=0.0) + acc
        tl.store(out, acc, mask=stored)


@triton.jit(do_not_specialize=["slots"])
def _up(
    x,
    x_stride,
    packed,
    order,
    tiles,
    hidden,  # [pairs, 16 UNITS], the weights' dtype
    slots,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One tile's products with CHUNK rows of ``up``, squared."""
    CHUNKS: tl.constexpr = (UNITS * _UNIT + _CHUNK - 1) // _CHUNK
    expert, pair, real, used = _load_tile(tl.program_id(0) // CHUNKS, order, tiles, slots)
    if not used:
        return
    dtype: tl.constexpr = packed.dtype.element_ty
    inner = tl.program_id(0) % CHUNKS * _CHUNK + tl.arange(0, _CHUNK)[None, :]
    k = tl.arange(0, BLOCK_K)
    rows = x + (pair // TOP_K).to(tl.int64)[:, None] * x_stride + k[None, :]
    step = packed + expert * UNITS * (2 * _UNIT * K)
    offsets = (inner // _UNIT * (2 * _UNIT) + inner % _UNIT) * K + k[:, None]
    acc = tl.zeros([_TILE, _CHUNK], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(rows + start, mask=real[:, None] & (start + k[None, :] < K), other=0.0).to(dtype)
        inside = (inner < UNITS * _UNIT) & (start + k[:, None] < K)
        acc = tl.dot(a, _load_weights(step, start + offsets, inside, FORMAT), acc, input_precision="ieee")
    out = hidden + pair.to(tl.int64)[:, None] * (UNITS * _UNIT) + inner
    tl.store(out, _relu2(acc).to(dtype), mask=real[:, None] & (inner < UNITS * _UNIT))


@triton.jit(do_not_specialize=["slots"])
def _down(
    hidden,
    packed,
    order,
    tiles,
    sums,  # [pairs, PROGRAMS, K] fp32
    slots,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One tile's products of slices of the inner dimension with BLOCK_N rows of ``down``."""
    BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    PER: tl.constexpr = SPLITS // PROGRAMS
    program = tl.program_id(0) // BLOCKS % PROGRAMS
    expert, pair, real, used = _load_tile(tl.program_id(0) // (BLOCKS * PROGRAMS), order, tiles, slots)
    if not used:
        return
    column = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    chunk = tl.arange(0, _CHUNK)
    rows = hidden + pair.to(tl.int64)[:, None] * (UNITS * _UNIT)
    step = packed + expert * UNITS * (2 * _UNIT * K) + _UNIT * K
    out = sums + (pair.to(tl.int64) * PROGRAMS + program)[:, None] * K + column
    stored = real[:, None] & (column < K)
    for split in range(program * PER, (program + 1) * PER):
        last = (split + 1) * UNITS // SPLITS * _UNIT
        acc = tl.zeros([_TILE, BLOCK_N], tl.float32)
        for start in range(split * UNITS // SPLITS * _UNIT, last, _CHUNK):
            inner = start + chunk
            a = tl.load(rows + inner[None, :], mask=real[:, None] & (inner[None, :] < last), other=0.0)
            offsets = (inner // _UNIT * (2 * _UNIT) + inner % _UNIT)[:, None] * K + column
            inside = (inner[:, None] < last) & (column < K)
            acc = tl.dot(a, _load_weights(step, offsets, inside, FORMAT), acc, input_precision="ieee")
        if split > program * PER:
            tl.debug_barrier()
            acc = tl.load(out, mask=stored, other=0.0) + acc
        tl.store(out, acc, mask=stored)


@triton.jit
def _combine(
    sums,
    weights,
    weights_stride,
    residual,
    residual_stride,
    out,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's sum over its picks, over the groups of each, over the slices of each, in order; then the residual."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        part = sums + (row * TOP_K + j) * PROGRAMS * K + column
        value = tl.zeros([BLOCK], tl.float32)
        for _ in tl.static_range(GROUPS):
            group = tl.zeros([BLOCK], tl.float32)
            for _ in tl.static_range(PROGRAMS // GROUPS):
                group += tl.load(part, mask=inside, other=0.0)
                part += K
            value += group
        total += tl.load(weights + row * weights_stride + j) * value
    if residual is not None:
        total = tl.load(residual + row * residual_stride + column, mask=inside) + total
    tl.store(out + row * K + column, total, mask=inside)
