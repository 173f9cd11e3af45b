"""Routed experts: every touched expert's weights are read once, in one sequential stream per program.

A program takes one 16-row tile of one expert and a slice of the inner dimension: per unit of it, it multiplies by the
unit's rows of ``up``, squares, and multiplies by its columns of ``down``, so no program needs what another computed.
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

from headrace.kernels.formats import Format
from headrace.kernels.moe import Routes
from headrace.kernels.triton.common import cdiv, next_power_of_2
from headrace.kernels.triton.expert_weights import PackedExperts, as_read, half_blocks, half_unit, times_down, times_up
from headrace.kernels.triton.quantised import LEAST_COLUMNS
from headrace.kernels.triton.routing import TILE, Plan
from headrace.kernels.triton.target import architecture

CHUNK = 64  # inner units that a wide expert's program computes or adds up at a time: a multiple of every unit

_TILE = tl.constexpr(TILE)
_CHUNK = tl.constexpr(CHUNK)


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
    pairs: int, top_k: int, experts: int, units: int, width: int, itemsize: int, arch: int, form: Format = "float"
) -> ExpertsParameters:
    """Launch parameters; itemsize: bytes of what is multiplied.

    Only ``programs`` follows the batch, and both of its values add in the same order.
    """
    # One token's tiles should fill the device once, in one wave. More than 8 slices cost more in partial sums than
    # they bring. An even number falls into two groups.
    splits = max(1, min(_multiprocessors(arch) // top_k, units, 8) // 2 * 2)
    groups = 2 if splits > 2 else 1
    # A slice's partial sums are 8 bytes per pair and column, written and read; with more than 2 pairs per expert that
    # begins to show beside the weights (1 % at inner size 2688 in bf16), and there are tiles enough to fill the device.
    few = {"float": 2, "fp8": 1, "nvfp4": 0.5}[form]
    programs = groups if pairs > few * experts else splits
    # 16 rows of 2048 bytes are 32 KB: with the 64 KB of one step's weights that is what the smallest SM holds, and
    # 16 x 1024 sums are 64 registers a thread.
    fused = next_power_of_2(width) * itemsize <= 2048
    if form != "float" and arch not in (80, 90, 100, 103):
        fused = False  # what a unit takes on its way through shared memory does not fit into 99 KB
    if arch in (90, 100, 103) or (arch == 80 and form == "nvfp4"):
        # 8 parts: the shortest chain from weights to sums. 3 stages: two steps' weights, 128 KB, in flight.
        stages = 2 if arch == 80 else 3
        return ExpertsParameters(fused, splits, groups, programs, parts=8, num_warps=8, num_stages=stages)
    # Two parts need 2 KB less for adding up, and so fit 3 stages into sm_80's shared memory, 2 into all others'. Those
    # of quantised weights need more, for operands on their way through it.
    stages = 3 if arch == 80 and form == "float" else 2
    return ExpertsParameters(fused, splits, groups, programs, parts=2, num_warps=8, num_stages=stages)


def _multiprocessors(arch: int) -> int:
    """SMs of the architecture's largest card: A100, H100, B200, RTX PRO 6000. Not the device's own: bits follow it."""
    return {80: 108, 90: 132, 100: 148, 103: 148, 120: 188}.get(arch, 128)


def experts(x: Tensor, packed: PackedExperts, routes: Routes, *, residual: Tensor | None = None) -> Tensor:
    """See ``headrace.kernels.moe.experts``. ``routes`` come from this backend's ``route``."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out
    plan, top_k = routes.plan, routes.experts.shape[1]
    if not isinstance(plan, Plan):
        raise TypeError(f"routes without this backend's plan: {plan!r}")
    count, units = packed.tiles.shape[:2]
    pairs, arch = rows * top_k, architecture(x.device)
    chosen = parameters(pairs, top_k, count, units, width, packed.dtype.itemsize, arch, packed.format)
    sums = torch.empty(pairs, chosen.programs, width, dtype=torch.float32, device=x.device)
    launch = _launch_fused if chosen.fused else _launch_wide
    launch(x, packed, plan, top_k, sums, chosen)
    block = 128  # one column a thread: all of a pair's loads fit into registers, so their latencies overlap
    _combine[(rows, cdiv(width, block))](
        sums,
        routes.weights,
        routes.weights.stride(0),
        routes.experts,
        packed.down_scale,
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


def _launch_fused(
    x: Tensor, packed: PackedExperts, plan: Plan, top_k: int, sums: Tensor, chosen: ExpertsParameters
) -> None:
    width, unit = x.shape[1], LEAST_COLUMNS[packed.format]
    _fused[(plan.slots * chosen.programs,)](
        x,
        x.stride(0),
        packed.tiles,
        packed.block_scales,
        packed.up_scale,
        plan.order,
        plan.tiles,
        sums,
        plan.slots,
        K=width,
        UNITS=packed.tiles.shape[1],
        UNIT=unit,
        TOP_K=top_k,
        SPLITS=chosen.splits,
        PROGRAMS=chosen.programs,
        WIDTH=max(next_power_of_2(width), unit * chosen.parts),
        PARTS=chosen.parts,
        FORMAT=packed.format,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=False,
    )


def _launch_wide(
    x: Tensor, packed: PackedExperts, plan: Plan, top_k: int, sums: Tensor, chosen: ExpertsParameters
) -> None:
    width, units, unit = x.shape[1], packed.tiles.shape[1], LEAST_COLUMNS[packed.format]
    chunks, blocks = cdiv(units * unit, CHUNK), cdiv(width, 128)
    hidden = torch.empty(sums.shape[0], units * unit, dtype=packed.dtype, device=x.device)
    _up[(plan.slots * chunks,)](
        x,
        x.stride(0),
        packed.tiles,
        packed.block_scales,
        packed.up_scale,
        plan.order,
        plan.tiles,
        hidden,
        plan.slots,
        K=width,
        UNITS=units,
        UNIT=unit,
        TOP_K=top_k,
        BLOCK_K=128,
        FORMAT=packed.format,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    _down[(plan.slots * chosen.programs * blocks,)](
        hidden,
        packed.tiles,
        packed.block_scales,
        plan.order,
        plan.tiles,
        sums,
        plan.slots,
        K=width,
        UNITS=units,
        UNIT=unit,
        SPLITS=chosen.splits,
        PROGRAMS=chosen.programs,
        BLOCK_N=128,
        FORMAT=packed.format,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )


@triton.jit
def _load_weights(tiles, offsets, inside):
    """Weights of floats, zero outside; ``inside`` is None where nothing can be outside.

    They are read once: L2 shall rather keep the partial sums.
    """
    if inside is None:
        return tl.load(tiles + offsets, eviction_policy="evict_first")
    else:
        return tl.load(tiles + offsets, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.constexpr_function
def _multiplied(stored, form):
    """The dtype of operands."""
    return stored if form == "float" else tl.bfloat16


@triton.jit
def _at_unit(packed, blocks, unit, K: tl.constexpr, UNIT: tl.constexpr, FORMAT: tl.constexpr):
    """Where a unit's weights begin, and its block scales if it is of NVFP4."""
    weights = packed + unit * (2 * half_unit(K, UNIT, FORMAT))
    if FORMAT == "nvfp4":
        return weights, blocks + unit * (2 * half_blocks(K))
    else:
        return weights, weights  # a function returns no None on Triton 3.6


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


@triton.jit
def _add_unit(
    acc,
    even,
    odd,
    tiles,
    blocks,
    scale,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """acc [16, WIDTH] plus what a quantised unit adds to it; scale: pointer to that of ``up``."""
    COLUMNS: tl.constexpr = WIDTH // PARTS
    factor = tl.load(scale)
    inner = tl.sum(times_up(even, odd, tiles, blocks, 0, UNIT, K, COLUMNS, 0, 32, FORMAT), 0)
    inner = _relu2(inner * factor).to(tl.bfloat16)
    others = inner
    if FORMAT == "nvfp4":
        others = tl.sum(times_up(even, odd, tiles, blocks, 0, UNIT, K, COLUMNS, 32, 32, FORMAT), 0)
        others = _relu2(others * factor).to(tl.bfloat16)
    down = tiles + half_unit(K, UNIT, FORMAT)
    return times_down(inner, others, down, blocks, 0, UNIT, K, WIDTH, UNIT, FORMAT, acc)


@triton.jit(do_not_specialize=["slots"])
def _fused(
    x,
    x_stride,
    packed,
    blocks,
    up_scale,
    order,
    tiles,
    sums,  # [pairs, PROGRAMS, K] fp32
    slots,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    PER: tl.constexpr = SPLITS // PROGRAMS
    HALF: tl.constexpr = half_unit(K, UNIT, FORMAT)
    program = tl.program_id(0) % PROGRAMS
    expert, pair, real, used = _load_tile(tl.program_id(0) // PROGRAMS, order, tiles, slots)
    if not used:
        return
    dtype: tl.constexpr = _multiplied(packed.dtype.element_ty, FORMAT)
    unit = tl.arange(0, UNIT)
    column = tl.arange(0, WIDTH)[None, :]
    # K in PARTS parts along the first axis: [PARTS, 16 rows, WIDTH / PARTS] @ [PARTS, WIDTH / PARTS, UNIT]
    part = tl.arange(0, PARTS)[:, None, None] * (WIDTH // PARTS)
    along = part + tl.arange(0, WIDTH // PARTS)[None, None, :]
    down_part = part + tl.arange(0, WIDTH // PARTS)[None, :, None]
    token = (pair // TOP_K).to(tl.int64)[None, :, None]
    rows = tl.load(x + token * x_stride + along, mask=real[None, :, None] & (along < K), other=0.0).to(dtype)
    out = sums + (pair.to(tl.int64) * PROGRAMS + program)[:, None] * K + column
    stored = real[:, None] & (column < K)
    even, odd = as_read(rows, FORMAT)
    # Nothing is hoisted out of this loop: the addresses of ``out`` would take the registers that the sums need.
    for split in tl.range(program * PER, (program + 1) * PER, disable_licm=True):
        first = split * UNITS // SPLITS
        last = (split + 1) * UNITS // SPLITS
        step, scales = _at_unit(packed, blocks, expert * UNITS + first, K, UNIT, FORMAT)
        acc = tl.zeros([_TILE, WIDTH], tl.float32)
        for _ in range(first, last):
            if FORMAT == "float":
                up = _load_weights(step, unit[None, None, :] * K + down_part, None if WIDTH == K else down_part < K)
                inner = _relu2(tl.sum(tl.dot(rows, up, input_precision="ieee"), 0)).to(dtype)
                down = _load_weights(step + HALF, unit[:, None] * K + column, None if WIDTH == K else column < K)
                acc = tl.dot(inner, down, acc, input_precision="ieee")
            else:
                acc = _add_unit(acc, even, odd, step, scales, up_scale + expert, K, WIDTH, PARTS, UNIT, FORMAT)
            step += 2 * HALF
            if FORMAT == "nvfp4":
                scales += 2 * half_blocks(K)
        if split > program * PER:
            tl.debug_barrier()  # the load below need not be laid out over the threads as the store was
            acc = tl.load(out, mask=stored, other=0.0) + acc
        tl.store(out, acc, mask=stored)


@triton.jit(do_not_specialize=["slots"])
def _up(
    x,
    x_stride,
    packed,
    blocks,
    up_scale,
    order,
    tiles,
    hidden,  # [pairs, UNIT * UNITS], what is multiplied next
    slots,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One tile's products with CHUNK rows of ``up``, squared."""
    CHUNKS: tl.constexpr = (UNITS * UNIT + _CHUNK - 1) // _CHUNK
    expert, pair, real, used = _load_tile(tl.program_id(0) // CHUNKS, order, tiles, slots)
    if not used:
        return
    dtype: tl.constexpr = _multiplied(packed.dtype.element_ty, FORMAT)
    first = tl.program_id(0) % CHUNKS * _CHUNK
    inner = first + tl.arange(0, _CHUNK)[None, :]
    k = tl.arange(0, BLOCK_K)
    rows = x + (pair // TOP_K).to(tl.int64)[:, None] * x_stride + k[None, :]
    step, _ = _at_unit(packed, blocks, expert * UNITS, K, UNIT, FORMAT)
    offsets = (inner // UNIT * (2 * UNIT) + inner % UNIT) * K + k[:, None]
    chunk, scales = _at_unit(packed, blocks, expert * UNITS + first // UNIT, K, UNIT, FORMAT)
    acc = tl.zeros([_TILE, _CHUNK], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(rows + start, mask=real[:, None] & (start + k[None, :] < K), other=0.0).to(dtype)
        if FORMAT == "float":
            inside = (inner < UNITS * UNIT) & (start + k[:, None] < K)
            acc = tl.dot(a, _load_weights(step, start + offsets, inside), acc, input_precision="ieee")
        else:
            even, odd = as_read(a, FORMAT)
            acc = times_up(even, odd, chunk, scales, start, UNITS * UNIT - first, K, BLOCK_K, 0, _CHUNK, FORMAT, acc)
    if up_scale is not None:
        acc *= tl.load(up_scale + expert)
    out = hidden + pair.to(tl.int64)[:, None] * (UNITS * UNIT) + inner
    tl.store(out, _relu2(acc).to(dtype), mask=real[:, None] & (inner < UNITS * UNIT))


@triton.jit(do_not_specialize=["slots"])
def _down(
    hidden,
    packed,
    blocks,
    order,
    tiles,
    sums,  # [pairs, PROGRAMS, K] fp32
    slots,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
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
    output = tl.program_id(0) % BLOCKS * BLOCK_N
    column = output + tl.arange(0, BLOCK_N)[None, :]
    chunk, half = tl.arange(0, _CHUNK), tl.arange(0, _CHUNK // 2)[None, :]
    rows = hidden + pair.to(tl.int64)[:, None] * (UNITS * UNIT)
    step, _ = _at_unit(packed, blocks, expert * UNITS, K, UNIT, FORMAT)
    step += half_unit(K, UNIT, FORMAT)
    out = sums + (pair.to(tl.int64) * PROGRAMS + program)[:, None] * K + column
    stored = real[:, None] & (column < K)
    for split in range(program * PER, (program + 1) * PER):
        last = (split + 1) * UNITS // SPLITS * UNIT
        acc = tl.zeros([_TILE, BLOCK_N], tl.float32)
        for start in range(split * UNITS // SPLITS * UNIT, last, _CHUNK):
            inner = start + chunk
            if FORMAT == "nvfp4":
                even = tl.load(rows + start + half, mask=real[:, None], other=0.0)
                odd = tl.load(rows + start + 32 + half, mask=real[:, None], other=0.0)
            else:
                even = tl.load(rows + inner[None, :], mask=real[:, None] & (inner[None, :] < last), other=0.0)
                odd = even
            if FORMAT == "float":
                offsets = (inner // UNIT * (2 * UNIT) + inner % UNIT)[:, None] * K + column
                down = _load_weights(step, offsets, (inner[:, None] < last) & (column < K))
                acc = tl.dot(even, down, acc, input_precision="ieee")
            else:
                unit, scales = _at_unit(packed, blocks, expert * UNITS + start // UNIT, K, UNIT, FORMAT)
                unit += half_unit(K, UNIT, FORMAT)
                acc = times_down(even, odd, unit, scales, output, last - start, K, BLOCK_N, _CHUNK, FORMAT, acc)
        if split > program * PER:
            tl.debug_barrier()
            acc = tl.load(out, mask=stored, other=0.0) + acc
        tl.store(out, acc, mask=stored)


@triton.jit
def _combine(
    sums,
    weights,
    weights_stride,
    picked,
    down_scale,
    residual,
    residual_stride,
    out,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's sum over its picks, over the groups of each, over the slices of each, in order; then the residual.

    A pair's finished sum is multiplied by its expert's scale.
    """
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
        if down_scale is not None:
            value *= tl.load(down_scale + tl.load(picked + row * TOP_K + j))
        total += tl.load(weights + row * weights_stride + j) * value
    if residual is not None:
        total = tl.load(residual + row * residual_stride + column, mask=inside) + total
    tl.store(out + row * K + column, total, mask=inside)
