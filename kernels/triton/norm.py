"""RMS norm of rows, for where no projection follows that could take it along (``linear`` has its own)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.norm import Norm
from headrace.kernels.triton.common import next_power_of_2


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the channels of one group are walked; the order of their sum follows from it, so rows play no part."""

    channels: int
    warps: int


@cache
def blocks(span: int) -> Blocks:
    """For groups of ``span`` channels: a whole group at once up to 8192, with at most 32 values a thread."""
    channels = min(8192, max(128, next_power_of_2(span)))
    return Blocks(channels, warps=max(1, channels // 1024))


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """The contract is ``headrace.kernels.norm.rms_norm``."""
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=torch.float32, device=x.device)
    if not rows:
        return out
    span = channels // norm.groups
    block = blocks(span)
    _rms_norm[(rows, norm.groups)](  # rows first: only that dimension of a grid goes beyond 65535
        out,
        x,
        norm.weight,
        x.stride(0),
        x.stride(1),
        norm.eps,
        SPAN=span,
        GROUPS=norm.groups,
        BLOCK=block.channels,
        num_warps=block.warps,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _rms_norm(
    out,
    x,
    weight,
    row_stride,
    channel_stride,
    eps,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, row = tl.program_id(1) * SPAN, tl.program_id(0).to(tl.int64)
    x += row * row_stride
    out += row * GROUPS * SPAN
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, SPAN, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        values = tl.load(x + (first + lanes) * channel_stride, mask=lanes < SPAN, other=0.0)
        squares += values * values
    factor = tl.rsqrt(tl.sum(squares) / SPAN + eps)
    for start in tl.static_range(0, SPAN, BLOCK):  # a group that fits is still in registers: the load is the same
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < SPAN
        values = tl.load(x + (first + lanes) * channel_stride, mask=inside, other=0.0)
        scale = tl.load(weight + first + lanes, mask=inside, other=0.0)
        tl.store(out + first + lanes, values * factor * scale, mask=inside)
