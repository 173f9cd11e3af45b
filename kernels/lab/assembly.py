"""Numpy twins of the kernels' inline assembly, for Triton's interpreter: from what the formats mean, not from bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from headrace.kernels.formats import E2M1
from headrace.kernels.triton.quantised import FP8_TO_BF16, HIGH_CODES_TO_BF16, LOW_CODES_TO_BF16

Array = np.ndarray[Any, Any]

E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
E2M1_VALUES = np.array([*E2M1, *(-value for value in E2M1)], np.float32)


def fp8_to_bf16(stored: Array) -> Array:
    return E4M3_VALUES[stored]


def low_codes_to_bf16(codes: Array, factors: Array) -> Array:
    return _times(codes & 15, factors)


def high_codes_to_bf16(codes: Array, factors: Array) -> Array:
    return _times(codes >> 4, factors)


def _times(codes: Array, factors: Array) -> Array:
    """The codes are read as 2^-126 of themselves: as a bf16 whose lowest exponent they use."""
    product: Array = E2M1_VALUES[codes].astype(np.float64) * 2.0**-126 * factors
    return product.astype(np.float32)


TWINS: dict[str, Callable[..., Array]] = {
    FP8_TO_BF16: fp8_to_bf16,
    LOW_CODES_TO_BF16: low_codes_to_bf16,
    HIGH_CODES_TO_BF16: high_codes_to_bf16,
}
"""Inline assembly text -> its twin: arrays in, an array out."""
