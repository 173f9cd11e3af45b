"""Three launches for a run of prompt tokens: the convolution, all else that needs no state, the scan with D and gate.

The scan is the chunked form of Dao and Gu (2024), section 6, in blocks of at most 32 tokens: a program owns some rows
of one head's state, walks over the blocks in order and carries the state between them in registers, in fp32. A block's
products have one shape, blocks divide the chunk, and the state in memory is the state in registers, so a prompt cut at
any multiple of the chunk gives the bits of the whole. Short blocks do the least arithmetic: the products within a block
grow with its length, and nothing is written between blocks.

Tensor cores multiply bf16. The convolution leaves each of its results as two bf16 numbers, high and low, that add up to
it within 2^-17, and a product of two such pairs leaves out only low times low. So a product is right within 2^-16 in
the worst case, and results within a few 1e-6 of their size, at three multiplications for one; single bf16 operands,
which other engines use, would be off by 2^-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.mamba import MambaWeights, check_ring
from headrace.kernels.triton.activation import silu, softplus
from headrace.kernels.triton.common import cdiv, next_power_of_2
from headrace.kernels.triton.mamba_conv import convolve

CONV_TOKENS, CONV_CHANNELS = 8, 128  # a tile of the convolution; elementwise, so its shape is free


@dataclass(frozen=True, slots=True)
class ScanLaunch:
    """Blocks of ``length`` tokens (in tiles of block_t), block_p rows of a head's state, all its columns (block_n)."""

    length: int
    block_t: int
    block_p: int
    block_n: int
    block_k: int  # columns of the state at a time where scores are summed
    segments: int  # shares of the state's columns, one a warp


@cache
def scan_launch(head_dim: int, state_size: int, chunk: int) -> ScanLaunch:
    """A function of the model alone."""
    # Chunks of 32, 64, 128, ... tokens are blocks of 32: 64 would halve the steps, but the two parts of operands of
    # 64 x 128 do not fit in registers. The tensor cores' tiles are 16 wide at least.
    length = max(divisor for divisor in range(1, min(chunk, 32) + 1) if chunk % divisor == 0)
    block_t, block_n = (max(next_power_of_2(size), 16) for size in (length, state_size))
    # 32 rows of the state: two programs a head, so that one sequence fills the SMs, two programs on each. A warp keeps
    # 32 columns of them in registers: 16 would share the work finer, but leave room for one program on an SM only.
    block_p = min(max(next_power_of_2(head_dim), 16), 32)
    segment = min(block_n, 32)
    return ScanLaunch(length, block_t, block_p, block_n, block_k=segment, segments=block_n // segment)


def mamba_prefill(
    projected: Tensor, conv: Tensor, ssm: Tensor, slot: int, start: int, weights: MambaWeights, chunk: int
) -> Tensor:
    """A run of prompt tokens of one sequence; contract in ``headrace.kernels.mamba``.

    Channels of ``conv`` and the states of ``ssm`` are contiguous along their last dimension.
    """
    check_ring(conv, weights, 0)
    length, heads, inner = projected.shape[0], weights.a.shape[0], weights.inner
    out = torch.empty(length, inner, dtype=torch.float32, device=projected.device)
    if not length:
        return out
    channels, taps = weights.conv_weight.shape
    ring, state = conv[slot], ssm[slot]
    mixed = torch.empty(2, length, channels, dtype=torch.bfloat16, device=projected.device)
    _convolve_kernel[(cdiv(channels, CONV_CHANNELS), cdiv(length, CONV_TOKENS))](
        projected, projected.stride(0), ring, ring.stride(0), ring.shape[0],
        weights.conv_weight, weights.conv_bias, mixed, mixed.stride(0), start, length,
        INNER=inner, CHANNELS=channels, TAPS=taps, BLOCK_T=CONV_TOKENS, BLOCK_C=CONV_CHANNELS,
        num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    launch = scan_launch(weights.head_dim, weights.state_size, chunk)
    blocks = cdiv(length, launch.length)
    scores = torch.empty(
        blocks, weights.groups, launch.block_t, launch.block_t, dtype=torch.float32, device=projected.device
    )
    steps = torch.empty(blocks, heads, 2, launch.block_t, dtype=torch.float32, device=projected.device)
    # Two warps: one for 16 of at most 32 rows, more would repeat them.
    _scores_kernel[(weights.groups, blocks)](
        projected, projected.stride(0), mixed, mixed.stride(0), weights.a, weights.dt_bias, scores, steps, length,
        HEADS=heads, INNER=inner, GROUPS=weights.groups, STATE=weights.state_size, LENGTH=launch.length,
        BLOCK_T=launch.block_t, BLOCK_K=launch.block_k, BLOCK_H=next_power_of_2(heads // weights.groups),
        num_warps=2, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    _scan_kernel[(cdiv(weights.head_dim, launch.block_p), heads)](
        projected, projected.stride(0), mixed, mixed.stride(0), scores, steps, ring, ring.stride(0),
        ring.shape[0], state, state.stride(0), state.stride(1), weights.d, out, start, length,
        HEADS=heads, HEAD_DIM=weights.head_dim, GROUPS=weights.groups, STATE=weights.state_size, LENGTH=launch.length,
        BLOCK_T=launch.block_t, BLOCK_P=launch.block_p, BLOCK_N=launch.block_n, SEGMENTS=launch.segments,
        num_warps=launch.segments, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["start", "length"])  # one compiled kernel for all prompts
def _convolve_kernel(
    projected, row_stride, ring, entry_stride, entries, weight, bias, mixed, low_offset, start, length,
    INNER: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mixed [2, length, CHANNELS] bf16: the convolution's results, their high and low parts."""
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    valid = (token < length) & (channel < CHANNELS)
    xbc = projected + INNER
    x, _ = convolve(token, channel, valid, xbc, row_stride, ring, entry_stride, entries, start, weight, bias, TAPS)
    high, low = _split(x)
    at = mixed + token * CHANNELS + channel
    tl.store(at, high, mask=valid)
    tl.store(at + low_offset, low, mask=valid)


@triton.jit(do_not_specialize=["length"])  # one compiled kernel for all prompts
def _scores_kernel(
    projected, row_stride, mixed, low_offset, a, dt_bias, scores, steps, length,
    HEADS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What does not depend on the state, for a block's tokens and a group's heads.

    scores [blocks, GROUPS, BLOCK_T, BLOCK_T]: C_t . B_s; steps [blocks, HEADS, 2, BLOCK_T]: dt_t, and the log decay
    since the block's start, that of t's own step included.
    """
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * STATE
    SHARED: tl.constexpr = HEADS // GROUPS
    group, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    token = block * LENGTH + t
    valid = (t < LENGTH) & (token < length)
    at = mixed + token[:, None] * CHANNELS + INNER + group * STATE
    score = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for first in range(0, STATE, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (n < STATE)[None, :]
        b_high, b_low = _load_pair(at + n[None, :], low_offset, inside)
        c_high, c_low = _load_pair(at + GROUPS * STATE + n[None, :], low_offset, inside)
        score = _product(c_high, c_low, tl.trans(b_high), tl.trans(b_low), score)
    tile = scores + (block * GROUPS + group) * BLOCK_T * BLOCK_T
    tl.store(tile + t[:, None] * BLOCK_T + t[None, :], score)

    i = tl.arange(0, BLOCK_H)
    head, ours = group * SHARED + i, i < SHARED
    rate, shift = tl.load(a + head, mask=ours, other=0.0), tl.load(dt_bias + head, mask=ours, other=0.0)
    raw = projected + token[:, None] * row_stride + INNER + CHANNELS + head[None, :]
    within = valid[:, None] & ours[None, :]
    # A step of no length changes nothing: such are those of tokens past the end.
    dt = tl.where(within, softplus(tl.load(raw, mask=within, other=0.0) + shift[None, :]), 0.0)
    step = steps + (block * HEADS + head[None, :]) * (2 * BLOCK_T) + t[:, None]
    tl.store(step, dt, mask=ours[None, :])
    tl.store(step + BLOCK_T, tl.cumsum(dt * rate[None, :], 0), mask=ours[None, :])


@triton.jit(do_not_specialize=["start", "length"])  # one compiled kernel for all prompts
def _scan_kernel(
    projected, row_stride, mixed, low_offset, scores, steps, ring, entry_stride, entries,
    state, state_head, state_row, d, out, start, length,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """A warp owns a segment of the state's columns, [SEGMENTS, BLOCK_P, SEGMENT] together: its products with B add to
    the segment where it lies, those with C are an operand out of registers, and only their sums cross the warps."""
    INNER: tl.constexpr = HEADS * HEAD_DIM
    SHARED: tl.constexpr = HEADS // GROUPS
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * STATE
    SEGMENT: tl.constexpr = BLOCK_N // SEGMENTS
    part, head = tl.program_id(0), tl.program_id(1)
    p, t = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_T)
    n = tl.arange(0, SEGMENTS)[:, None, None] * SEGMENT + tl.arange(0, SEGMENT)[None, None, :]
    in_head, in_state = p < HEAD_DIM, n < STATE
    x_channel, b_channel = head * HEAD_DIM + p, INNER + head // SHARED * STATE + n
    c_channel = b_channel + GROUPS * STATE
    skip = tl.load(d + head)

    states = state + head * state_head + p[None, :, None] * state_row + n
    held = p < tl.where(start > 0, HEAD_DIM, 0)  # position 0 begins from zeros, whatever is there
    h = tl.load(states, mask=held[None, :, None] & in_state, other=0.0)
    # Addresses that no step changes are computed again in each: kept, they would take registers the operands need.
    for first in tl.range(0, length, LENGTH, disable_licm=True):
        token = tl.cast(first, tl.int64) + t
        valid = (t < LENGTH) & (token < length)
        block = tl.cast(first // LENGTH, tl.int64)
        step = steps + (block * HEADS + head) * (2 * BLOCK_T)
        dt, total, whole = tl.load(step + t), tl.load(step + BLOCK_T + t), tl.load(step + (2 * BLOCK_T - 1))

        at = mixed + token * CHANNELS
        c_high, c_low = _load_pair(at[None, :, None] + c_channel, low_offset, valid[None, :, None] & in_state)
        h_high, h_low = _split(h)
        sums = tl.zeros([SEGMENTS, BLOCK_P, BLOCK_T], tl.float32)
        sums = _product(h_high, h_low, tl.permute(c_high, (0, 2, 1)), tl.permute(c_low, (0, 2, 1)), sums)
        y = tl.trans(tl.sum(sums, 0)) * tl.exp(total)[:, None]

        score = scores + (block * GROUPS + head // SHARED) * BLOCK_T * BLOCK_T + t[:, None] * BLOCK_T + t[None, :]
        since = tl.where(t[:, None] >= t[None, :], total[:, None] - total[None, :], float("-inf"))
        w_high, w_low = _split(tl.load(score) * tl.exp(since) * dt[None, :])
        keep = valid[:, None] & in_head[None, :]
        x_high, x_low = _load_pair(at[:, None] + x_channel[None, :], low_offset, keep)
        x = x_high.to(tl.float32) + x_low.to(tl.float32)
        y += _product(w_high, w_low, x_high, x_low, tl.zeros([BLOCK_T, BLOCK_P], tl.float32)) + x * skip

        b_high, b_low = _load_pair(at[None, :, None] + b_channel, low_offset, valid[None, :, None] & in_state)
        s_high, s_low = _split(tl.trans(x * (dt * tl.exp(whole - total))[:, None]))
        s_high, s_low = _for_each(s_high, SEGMENTS), _for_each(s_low, SEGMENTS)
        added = _product(s_high, s_low, b_high, b_low, tl.zeros([SEGMENTS, BLOCK_P, SEGMENT], tl.float32))
        # Added to the state after the sum, not in it: tensor cores truncate what they accumulate.
        h = h * tl.exp(whole) + added

        gate = tl.load(projected + token[:, None] * row_stride + x_channel[None, :], mask=keep, other=0.0)
        tl.store(out + token[:, None] * INNER + x_channel[None, :], y * silu(gate), mask=keep)
    tl.store(states, h, mask=in_head[None, :, None] & in_state)
    stored = n < tl.where((part == 0) & (head % SHARED == 0), STATE, 0)
    for token in range(tl.maximum(length - entries, 0), length):
        new = projected + tl.cast(token, tl.int64) * row_stride + INNER
        _keep(new, ring + (start + token) % entries * entry_stride, x_channel, in_head, b_channel, c_channel, stored)


@triton.jit
def _split(x):
    """fp32 -> two bf16 that add up to it, within 2^-17 of it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _load_pair(at, low_offset, mask):
    return tl.load(at, mask=mask, other=0.0), tl.load(at + low_offset, mask=mask, other=0.0)


@triton.jit
def _product(a_high, a_low, b_high, b_low, total):
    """total [..., M, N] fp32 + [..., M, K] @ [..., K, N] of operands in two parts, small terms first.

    Always mma.sync m16n8k16: matrices of at most 32 rows become nothing else, nor does a batch of them, which Triton
    gives to the warps (``common``).
    """
    total = tl.dot(a_low, b_high, total, input_precision="ieee")
    total = tl.dot(a_high, b_low, total, input_precision="ieee")
    return tl.dot(a_high, b_high, total, input_precision="ieee")


@triton.jit
def _for_each(x, BATCH: tl.constexpr):
    """[M, N] -> [BATCH, M, N]."""
    return tl.broadcast_to(x[None, :, :], (BATCH, x.shape[0], x.shape[1]))


@triton.jit
def _keep(new, entry, x_channel, in_head, b_channel, c_channel, stored):
    """One of the newest inputs goes into the ring: after the scan, when no program of the convolution can still be
    reading the older ones."""
    tl.store(entry + x_channel, tl.load(new + x_channel, mask=in_head), mask=in_head)
    tl.store(entry + b_channel, tl.load(new + b_channel, mask=stored), mask=stored)
    tl.store(entry + c_channel, tl.load(new + c_channel, mask=stored), mask=stored)
