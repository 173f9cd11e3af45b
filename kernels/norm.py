"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * w, over whole rows or over equal groups of channels.

A mean over a contiguous last dimension has one order of summation per row length, whatever the number of rows or
threads (tests/kernels/test_norm.py); over any other dimension torch chooses by layout, so rows are made contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm. Each of ``groups`` equal runs of channels is normalised by itself."""

    weight: Tensor  # [K] fp32; multiplies as it is (not 1 + w)
    eps: float
    groups: int = 1  # divides K


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [T, K] fp32 (any strides) -> [T, K] fp32."""
    rows, channels = x.shape
    grouped = x.reshape(rows, norm.groups, channels // norm.groups).contiguous()
    return _normalise(grouped, norm.eps).view(rows, channels) * norm.weight


def _normalise(x: Tensor, eps: float) -> Tensor:
    squares = x * x
    if squares[..., 0].numel() == 1:
        # A single long sum would be split among threads, in another order; of two, each is one thread's.
        squares = squares.expand(2, *squares.shape).contiguous()
        return x * torch.rsqrt(squares.mean(-1, keepdim=True)[0] + eps)
    return x * torch.rsqrt(squares.mean(-1, keepdim=True) + eps)
