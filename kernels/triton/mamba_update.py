"""One launch for the next tokens of every sequence: convolution, steps of the state space, gate.

A program owns one head of one sequence. It loads the head's state once, takes the rows one after the other and stores
the state once: 8 bytes a state element are all the traffic that counts. Convolving the group's B and C again for each
of its heads costs reads that L2 serves. The ring keeps programs apart: no entry that a step reads is one it writes.
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
from headrace.kernels.triton.common import next_power_of_2
from headrace.kernels.triton.mamba_conv import convolve


@dataclass(frozen=True, slots=True)
class UpdateLaunch:
    """The state's tile [segments, block_p, segment], segments * segment >= state_size."""

    block_p: int
    segments: int
    segment: int
    num_warps: int


@cache
def update_launch(head_dim: int, state_size: int) -> UpdateLaunch:
    """A function of the model alone: the sum over the state has one order."""
    block_p, block_n = next_power_of_2(head_dim), next_power_of_2(state_size)
    # 8 lanes of 16 bytes read a segment of 32 values, whole sectors; a warp's other lanes hold other rows, and the
    # further segments lie in the same lanes. So the sum over the state takes 3 shuffles a row in place of 5, and a
    # quarter of the rows a warp: 12 shuffles a thread for 64 x 128, where a row across a warp would take 80.
    segment = min(block_n, 32)
    # 64 registers a thread for the state: all of it is in flight at once, and enough are left to compute in.
    num_warps = min(max(block_p * block_n // (32 * 64), 1), 16)
    return UpdateLaunch(block_p, block_n // segment, segment, num_warps)


def mamba_update(
    projected: Tensor, conv: Tensor, ssm: Tensor, slots: Tensor, positions: Tensor, weights: MambaWeights, rows: int = 1
) -> Tensor:
    """The next ``rows`` tokens of each sequence; contract in ``headrace.kernels.mamba``.

    Channels of ``conv`` and the states of ``ssm`` are contiguous along their last dimension.
    """
    check_ring(conv, weights, rows)
    heads = weights.a.shape[0]
    out = torch.empty(projected.shape[0], weights.inner, dtype=torch.float32, device=projected.device)
    if not slots.shape[0]:
        return out
    launch = update_launch(weights.head_dim, weights.state_size)
    _update_kernel[(heads, slots.shape[0])](
        projected, projected.stride(0), conv, conv.stride(0), conv.stride(1), conv.shape[1],
        ssm, ssm.stride(0), ssm.stride(1), ssm.stride(2), slots, positions,
        weights.conv_weight, weights.conv_bias, weights.a, weights.d, weights.dt_bias, out,
        HEADS=heads, HEAD_DIM=weights.head_dim, GROUPS=weights.groups, STATE=weights.state_size,
        TAPS=weights.conv_weight.shape[1], ROWS=rows,
        BLOCK_P=launch.block_p, SEGMENTS=launch.segments, SEGMENT=launch.segment,
        num_warps=launch.num_warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _update_kernel(
    projected, row_stride, conv, slot_stride, entry_stride, entries,
    ssm, state_slot, state_head, state_row, slots, positions,
    conv_weight, conv_bias, a, d, dt_bias, out,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    INNER: tl.constexpr = HEADS * HEAD_DIM
    SHARED: tl.constexpr = HEADS // GROUPS
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, start = tl.load(slots + sequence), tl.load(positions + sequence)

    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, SEGMENTS)[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    in_head, in_state = p < HEAD_DIM, n < STATE
    # Loaded as a matrix of segments: of three dimensions, versions of Triton would give the lanes in different order.
    line = tl.arange(0, SEGMENTS * BLOCK_P)[:, None]
    of_p, of_n = line % BLOCK_P, line // BLOCK_P * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    states = ssm + slot * state_slot + head * state_head + of_p * state_row + of_n
    held = of_p < tl.where(start > 0, HEAD_DIM, 0)  # position 0 begins from zeros, whatever is there
    h = tl.load(states, mask=held & (of_n < STATE), other=0.0)
    h = tl.reshape(h, [SEGMENTS, BLOCK_P, SEGMENT])

    row = projected + sequence * ROWS * row_stride
    xbc, ring = row + INNER, conv + slot * slot_stride
    x_channel = head * HEAD_DIM + p
    b_channel = INNER + head // SHARED * STATE + n
    c_channel = b_channel + GROUPS * STATE
    rate, skip, shift = tl.load(a + head), tl.load(d + head), tl.load(dt_bias + head)
    stored = n < tl.where(head % SHARED == 0, STATE, 0)  # one head of a group keeps its B and C
    for j in tl.static_range(ROWS):
        token, tokens = tl.full([1], j, tl.int32), tl.full([1, 1], j, tl.int32)
        args = (xbc, row_stride, ring, entry_stride, entries, start, conv_weight, conv_bias)
        x, new_x = convolve(token, x_channel, in_head, *args, TAPS)
        b, new_b = convolve(tokens, b_channel, in_state, *args, TAPS)
        c, new_c = convolve(tokens, c_channel, in_state, *args, TAPS)
        entry = ring + (start + j) % entries * entry_stride
        tl.store(entry + x_channel, new_x, mask=in_head)
        tl.store(entry + b_channel, new_b, mask=stored)
        tl.store(entry + c_channel, new_c, mask=stored)

        own = row + j * row_stride
        dt = softplus(tl.load(own + INNER + INNER + 2 * GROUPS * STATE + head) + shift)
        h = h * tl.exp(dt * rate) + (x * dt)[None, :, None] * b[:, None, :]
        y = tl.sum(tl.sum(h * c[:, None, :], 0), 1) + x * skip
        gate = tl.load(own + x_channel, mask=in_head)
        tl.store(out + (sequence * ROWS + j) * INNER + x_channel, y * silu(gate), mask=in_head)
    tl.store(states, tl.reshape(h, [SEGMENTS * BLOCK_P, SEGMENT]), mask=(of_p < HEAD_DIM) & (of_n < STATE))
