"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * w, plain and gated by groups.

A mean over a contiguous last dimension has one order of summation per row length, whatever the number of rows or
threads (tests/kernels/test_norm.py); over any other dimension torch chooses by layout, so rows are made contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.activation import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] fp32, weight [H] fp32 -> [T, H] fp32. The weight multiplies as it is (not 1 + w)."""
    return _normalise(x.contiguous(), eps) * weight


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y * silu(gate), normalised within each of ``groups`` equal runs of channels, then times the weight.

    y, gate [T, C] fp32 (any strides), weight [C] fp32; groups divides C -> [T, C] fp32. The gate comes before the
    norm (Mamba-2's ``norm_before_gate=False``).
    """
    rows, channels = y.shape
    gated = (y * silu(gate)).reshape(rows, groups, channels // groups).contiguous()
    return _normalise(gated, eps).view(rows, channels) * weight


def _normalise(x: Tensor, eps: float) -> Tensor:
    squares = x * x
    if squares[..., 0].numel() == 1:
        # A single long sum would be split among threads, in another order; of two, each is one thread's.
        squares = squares.expand(2, *squares.shape).contiguous()
        return x * torch.rsqrt(squares.mean(-1, keepdim=True)[0] + eps)
    return x * torch.rsqrt(squares.mean(-1, keepdim=True) + eps)
