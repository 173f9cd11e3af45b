"""Weights made FP8 or NVFP4, as NVIDIA's modelopt makes them for the released checkpoints.

FP8: scale = max |w| / 448, values rounded to nearest even. NVFP4: scale = max |w| / 2688, so that block scales use all
of e4m3; each block's scale is the e4m3 value of least squared error, codes rounded to nearest even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.formats import BLOCK, E2M1, Fp8, Nvfp4

E4M3_MAX = 448.0
E4M3_LARGEST = 126
"""The bits of 448; the positive values of e4m3 are the codes 1 (2^-9) .. 126, in order."""

DOWN, UP = 7, 7
"""How many e4m3 values below and above the least that cuts nothing off are tried for a block.

Eight above is a scale at least twice as large: its grid is a part of the smaller one's. Eight below halves it, or more:
half of the block's largest value is cut off (tests/kernels/test_formats.py tries all 126).
"""

SMALLEST_SCALE = 2.0**-100
"""Of a whole weight: what is smaller loses its values, not its finiteness."""

CHUNK = 1 << 16
"""Elements that are encoded at a time, about: what is made of them should stay in a cache."""


def quantize_fp8(weight: Tensor) -> Fp8:
    """weight [N, K] fp32, bf16 or fp16. Raises ValueError if it holds what is not finite."""
    scale = _scale(weight, E4M3_MAX)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in _chunks(weight):
        values[rows] = (weight[rows].float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Fp8(values, scale)


def quantize_nvfp4(weight: Tensor) -> Nvfp4:
    """weight [N, K] fp32, bf16 or fp16. Raises ValueError if it holds what is not finite, or K is no multiple of 16."""
    features, width = weight.shape
    if width % BLOCK:
        raise ValueError(f"weight {[features, width]}: K must be a multiple of {BLOCK}")
    scale = _scale(weight, E4M3_MAX * E2M1[-1])
    codes = torch.empty(features, width // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(features, width // BLOCK, dtype=torch.uint8, device=weight.device)
    for rows in _chunks(weight):
        block_codes, scales[rows] = _encode((weight[rows].float() / scale).view(-1, width // BLOCK, BLOCK))
        pairs = block_codes.view(-1, width // 2, 2)
        codes[rows] = pairs[..., 0] | pairs[..., 1] << 4
    return Nvfp4(codes, scales.view(torch.float8_e4m3fn), scale)


def e2m1_codes(x: Tensor) -> Tensor:
    """Any shape, fp32, not NaN -> uint8 codes 0..15 of the nearest e2m1 values, ties to the even code, saturating."""
    middles = torch.tensor([(low + high) / 2 for low, high in zip(E2M1, E2M1[1:], strict=False)], device=x.device)
    # A middle belongs to the lower code where that is even; elsewhere the bound is the number before it.
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros((), device=x.device))
    magnitude = torch.bucketize(x.abs(), middles).to(torch.uint8)
    return magnitude | x.signbit().to(torch.uint8) << 3


def _encode(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Unscaled blocks [R, B, 16] fp32 -> their codes, and the bits of the block scales [R, B], both uint8."""
    magnitudes = blocks.abs()
    table = torch.arange(E4M3_LARGEST + 1, dtype=torch.uint8, device=blocks.device).view(torch.float8_e4m3fn).float()
    # The least scale that cuts nothing off comes first, so that it wins where others are as good.
    base = torch.bucketize(magnitudes.amax(-1) / E2M1[-1], table).clamp_(1, E4M3_LARGEST)
    best, chosen = torch.full_like(magnitudes[..., 0], torch.inf), base
    for step in (0, *range(-1, -DOWN - 1, -1), *range(1, UP + 1)):
        bits = (base + step).clamp_(1, E4M3_LARGEST)
        unit = table[bits][..., None]
        error = nearest(magnitudes / unit).mul_(unit).sub_(magnitudes).square_().sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, bits, chosen)
    return e2m1_codes(blocks / table[chosen][..., None]), chosen.to(torch.uint8)


def nearest(x: Tensor) -> Tensor:
    """x >= 0 fp32, overwritten -> the nearest e2m1 values, ties to even: those of ``e2m1_codes``, several times faster.

    A sum with 2^22 has a last bit of 1/2, which is the step of e2m1 below 2; above, steps double with x.
    """
    x.clamp_(max=E2M1[-1])
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of two up to x
    shift = power.clamp_(min=1).mul_(2.0**22)
    return x.add_(shift).sub_(shift)


def _scale(weight: Tensor, largest: float) -> Tensor:
    """[] fp32: what makes the weight's largest magnitude ``largest``; 1 for a weight of zeros."""
    peaks = [float(weight[rows].float().abs().amax()) for rows in _chunks(weight)]
    if not all(peak < torch.inf for peak in peaks):  # a NaN is not
        raise ValueError(f"weight {list(weight.shape)} holds values that are not finite")
    peak = max(peaks, default=0.0)
    scale = max(peak / largest, SMALLEST_SCALE) if peak else 1.0
    return torch.tensor(scale, dtype=torch.float32, device=weight.device)


def _chunks(weight: Tensor) -> list[slice]:
    """Rows at a time, so that no copy of the whole is made."""
    features, width = weight.shape
    rows = max(1, CHUNK // max(width, 1))
    return [slice(first, first + rows) for first in range(0, features if width else 0, rows)]
