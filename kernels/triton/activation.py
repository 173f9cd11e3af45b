"""Elementwise functions on the device: the formulas of ``headrace.kernels.activation``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x / (1 + exp(-x)), fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), fp32, to a few units in the last place also where it is tiny."""
    # log1p of u in (0, 1]: the logarithm of the rounded 1 + u, corrected by how much of u the rounding kept (Higham,
    # Accuracy and Stability of Numerical Algorithms, 1.14.1). tl.log is good to an ulp near 1.
    u = tl.exp(-tl.abs(x))
    rounded = 1.0 + u
    kept = rounded - 1.0
    log1p = tl.where(kept == 0.0, u, tl.log(rounded) * (u / tl.where(kept == 0.0, 1.0, kept)))
    return tl.maximum(x, 0.0) + log1p
