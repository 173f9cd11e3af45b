"""Three launches for a run of prompt tokens: the convolution, the products C B^T, the scan with D and the gate.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.mamba import MambaWeights, check_ring
from headrace.kernels.triton.activation import silu, softplus
from headrace.kernels.triton.common import mma
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
    num_warps: int


def scan_launch(head_dim: int, state_size: int, chunk: int) -> ScanLaunch:
    """A function of the model alone."""
    # Chunks of 32, 64, 128, ... tokens are blocks of 32: 64 would halve the steps, but the two parts of operands of
    # 64 x 128 do not fit in registers. The tensor cores' tiles are 16 wide at least.
    length = max(divisor for divisor in range(1, min(chunk, 32) + 1) if chunk % divisor == 0)
    block_t, block_n = (max(triton.next_power_of_2(size), 16) for size in (length, state_size))
    # 32 rows of the state: two programs a head, so that one sequence fills the SMs.
    block_p = min(max(triton.next_power_of_2(head_dim), 16), 32)
    return ScanLaunch(length, block_t, block_p, block_n, block_k=min(block_n, 32), num_warps=8)


def mamba_prefill(
    projected: Tensor, conv: Tensor, ssm: Tensor, slot: int, start: int, weights: MambaWeights, chunk: int
) -> Tensor:
    """A run of prompt tokens of one sequence; contract in ``headrace.kernels.mamba``.

    Channels of ``conv`` and the states of ``ssm`` are contiguous along their last dimension.
    """
    check_ring(conv, weights, 0)
    length, heads, inner = projected.shape[0], weights.a.shape[0], weights.inner
    out = torch.empty(length, inner, device=projected.device)
    if not length:
        return out
    channels, taps = weights.conv_weight.shape
    ring, state = conv[slot], ssm[slot]
    mixed = torch.empty(2, length, channels, dtype=torch.bfloat16, device=projected.device)
    _convolve_kernel[(triton.cdiv(channels, CONV_CHANNELS), triton.cdiv(length, CONV_TOKENS))](
        projected, projected.stride(0), ring, ring.stride(0), ring.shape[0],
        weights.conv_weight, weights.conv_bias, mixed, mixed.stride(0), start, length,
        INNER=inner, CHANNELS=channels, TAPS=taps, BLOCK_T=CONV_TOKENS, BLOCK_C=CONV_CHANNELS,
        num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    launch = scan_launch(weights.head_dim, weights.state_size, chunk)
    blocks = triton.cdiv(length, launch.length)
    scores = torch.empty(blocks, weights.groups, launch.block_t, launch.block_t, device=projected.device)
    _scores_kernel[(weights.groups, blocks)](
        mixed, mixed.stride(0), scores, length,
        INNER=inner, GROUPS=weights.groups, STATE=weights.state_size, LENGTH=launch.length,
        BLOCK_T=launch.block_t, BLOCK_K=launch.block_k,
        num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    _scan_kernel[(triton.cdiv(weights.head_dim, launch.block_p), heads)](
        projected, projected.stride(0), mixed, mixed.stride(0), scores, ring, ring.stride(0), ring.shape[0],
        state, state.stride(0), state.stride(1), weights.a, weights.d, weights.dt_bias, out, start, length,
        HEADS=heads, HEAD_DIM=weights.head_dim, GROUPS=weights.groups, STATE=weights.state_size, LENGTH=launch.length,
        BLOCK_T=launch.block_t, BLOCK_P=launch.block_p, BLOCK_N=launch.block_n,
        num_warps=launch.num_warps, num_stages=1, enable_fp_fusion=False,
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
    mixed, low_offset, scores, length,
    INNER: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scores [blocks, GROUPS, BLOCK_T, BLOCK_T]: C_t . B_s of a block's tokens, once for a group's heads."""
    group, block = tl.program_id(0), tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    token = block.to(tl.int64) * LENGTH + t
    valid = (t < LENGTH) & (token < length)
    at = mixed + token[:, None] * (INNER + 2 * GROUPS * STATE) + INNER + group * STATE
    total = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for first in range(0, STATE, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (n < STATE)[None, :]
        b_high, b_low = _load_pair(at + n[None, :], low_offset, inside)
        c_high, c_low = _load_pair(at + GROUPS * STATE + n[None, :], low_offset, inside)
        total = _product(c_high, c_low, tl.trans(b_high), tl.trans(b_low), total)
    tile = scores + (block * GROUPS + group).to(tl.int64) * BLOCK_T * BLOCK_T
    tl.store(tile + t[:, None] * BLOCK_T + t[None, :], total)


@triton.jit(do_not_specialize=["start", "length"])  # one compiled kernel for all prompts
def _scan_kernel(
    projected, row_stride, mixed, low_offset, scores, ring, entry_stride, entries,
    state, state_head, state_row, a, d, dt_bias, out, start, length,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    INNER: tl.constexpr = HEADS * HEAD_DIM
    SHARED: tl.constexpr = HEADS // GROUPS
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * STATE
    part, head = tl.program_id(0), tl.program_id(1)
    p, n, t = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    in_head, in_state = p < HEAD_DIM, n < STATE
    x_channel = head * HEAD_DIM + p
    b_channel = INNER + head // SHARED * STATE + n
    c_channel = b_channel + GROUPS * STATE
    rate, skip, shift = tl.load(a + head), tl.load(d + head), tl.load(dt_bias + head)

    states = state + head * state_head + p[:, None] * state_row + n[None, :]
    held = p < tl.where(start > 0, HEAD_DIM, 0)  # position 0 begins from zeros, whatever is there
    h = tl.load(states, mask=held[:, None] & in_state[None, :], other=0.0)
    for first in range(0, length, LENGTH):
        token = tl.cast(first, tl.int64) + t
        valid = (t < LENGTH) & (token < length)
        row = projected + token * row_stride
        raw = tl.load(row + INNER + CHANNELS + head, mask=valid, other=0.0)
        dt = tl.where(valid, softplus(raw + shift), 0.0)  # a step of no length changes nothing
        total = tl.cumsum(dt * rate, 0)  # log decay since the block's start, that of its own step included
        whole = tl.sum(tl.where(t == BLOCK_T - 1, total, 0.0), 0)

        at = mixed + token[:, None] * CHANNELS
        c_high, c_low = _load_pair(at + c_channel[None, :], low_offset, valid[:, None] & in_state[None, :])
        h_high, h_low = _split(h)
        y = _matmul(c_high, c_low, tl.trans(h_high), tl.trans(h_low)) * tl.exp(total)[:, None]

        tile = scores + ((first // LENGTH) * GROUPS + head // SHARED) * BLOCK_T * BLOCK_T
        score = tl.load(tile + t[:, None] * BLOCK_T + t[None, :])
        since = tl.where(t[:, None] >= t[None, :], total[:, None] - total[None, :], float("-inf"))
        w_high, w_low = _split(score * tl.exp(since) * dt[None, :])
        x_high, x_low = _load_pair(at + x_channel[None, :], low_offset, valid[:, None] & in_head[None, :])
        x = x_high.to(tl.float32) + x_low.to(tl.float32)
        y += _matmul(w_high, w_low, x_high, x_low) + x * skip

        b_high, b_low = _load_pair(at + b_channel[None, :], low_offset, valid[:, None] & in_state[None, :])
        s_high, s_low = _split(x * (dt * tl.exp(whole - total))[:, None])
        # Added to the state after the sum, not in it: tensor cores truncate what they accumulate.
        h = h * tl.exp(whole) + _matmul(tl.trans(s_high), tl.trans(s_low), b_high, b_low)

        keep = valid[:, None] & in_head[None, :]
        gate = tl.load(row[:, None] + x_channel[None, :], mask=keep, other=0.0)
        tl.store(out + token[:, None] * INNER + x_channel[None, :], y * silu(gate), mask=keep)
    tl.store(states, h, mask=in_head[:, None] & in_state[None, :])

    # The newest inputs go into the ring here, where no program of the convolution can still be reading the older ones.
    stored = n < tl.where((part == 0) & (head % SHARED == 0), STATE, 0)
    for token in range(tl.maximum(length - entries, 0), length):
        new = projected + tl.cast(token, tl.int64) * row_stride + INNER
        entry = ring + (start + token) % entries * entry_stride
        _copy(new + x_channel, entry + x_channel, in_head)
        _copy(new + b_channel, entry + b_channel, stored)
        _copy(new + c_channel, entry + c_channel, stored)


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
    """total [1, M, N] fp32 + [M, K] @ [K, N] of operands in two parts, small terms first."""
    total = tl.dot(a_low, b_high, total, input_precision="ieee")
    total = tl.dot(a_high, b_low, total, input_precision="ieee")
    return tl.dot(a_high, b_high, total, input_precision="ieee")


@triton.jit
def _matmul(a_high, a_low, b_high, b_low):
    """[M, K] @ [K, N] -> [M, N] fp32 of operands in two parts."""
    M: tl.constexpr = a_high.shape[0]
    N: tl.constexpr = b_high.shape[1]
    return _product(a_high, a_low, b_high, b_low, tl.zeros([M, N], tl.float32))


@triton.jit
def _copy(source, target, mask):
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
