"""The causal depthwise convolution over a ring of inputs, shared by the prompt path and the decode path."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.activation import silu


@triton.jit
def convolve(
    token, channel, valid, xbc, row_stride, ring, entry_stride, entries, start, weight, bias, TAPS: tl.constexpr
):
    """silu(convolution) at ``token`` of a run of new tokens, and that token's own input as the ring stores it; fp32.

    xbc: pointer to the run's first input row; ring: pointer to the slot's entry 0; start: position of the run's first
    token. token, channel and valid broadcast against each other; where valid is false both results are zero or bias.
    """
    # Separate multiplies and adds in the order of the taps, as the reference: neither tile nor path can matter.
    dtype = ring.dtype.element_ty
    total = 0.0
    newest = 0.0
    for tap in tl.static_range(TAPS):
        at = token + (tap + 1 - TAPS)
        past = start + at
        stored = ring + past % entries * entry_stride + channel
        before = tl.load(stored, mask=valid & (at < 0) & (past >= 0), other=0.0)
        new = tl.load(xbc + at * row_stride + channel, mask=valid & (at >= 0), other=0.0)
        newest = tl.where(at >= 0, new.to(dtype), before).to(tl.float32)
        product = newest * tl.load(weight + channel * TAPS + tap, mask=valid, other=0.0)
        total = product if tap == 0 else total + product
    if bias is not None:
        total += tl.load(bias + channel, mask=valid, other=0.0)
    return silu(total), newest
