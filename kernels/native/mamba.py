"""Mamba-2; see ``kernels/mamba.py`` for the contracts.

Memory is contiguous along the last dimension; weights are contiguous.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.mamba import MambaWeights, check_ring
from headrace.kernels.native.library import Op, Pool
from headrace.kernels.native.linear import FORMATS

UPDATE = Op("mamba_update", "q" * 26)
PREFILL = Op("mamba_prefill", "q" * 26)


def mamba_update(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    slots: Tensor,
    positions: Tensor,
    weights: MambaWeights,
    rows: int = 1,
    *,
    pool: Pool,
) -> Tensor:
    """As the reference's; a sequence's state is read and written once for all its rows."""
    check_ring(conv, weights, rows)
    y = pool.empty(projected.shape[0], weights.inner)
    if not projected.shape[0]:
        return y
    slots, positions = pool.contiguous(slots), pool.contiguous(positions)
    shared = _shared(projected, conv, ssm, weights, y, pool)
    UPDATE(pool, *shared, slots.data_ptr(), positions.data_ptr(), slots.shape[0], rows)
    return y


def mamba_prefill(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    slot: int,
    start: int,
    weights: MambaWeights,
    chunk: int,
    *,
    pool: Pool,
) -> Tensor:
    """As the reference's; the state crosses blocks of at most 32 tokens in fp32."""
    check_ring(conv, weights, 0)
    y = pool.empty(projected.shape[0], weights.inner)
    if not projected.shape[0]:
        return y
    PREFILL(pool, *_shared(projected, conv, ssm, weights, y, pool), slot, start, projected.shape[0], chunk)
    return y


def _shared(
    projected: Tensor, conv: Tensor, ssm: Tensor, weights: MambaWeights, y: Tensor, pool: Pool
) -> tuple[int, ...]:
    """The fields of MambaArgs."""
    return (
        pool.rows(projected),
        projected.stride(0),
        conv.data_ptr(),
        FORMATS[conv.dtype],
        conv.stride(0),
        conv.stride(1),
        conv.shape[1],
        pool.rows(ssm),
        ssm.stride(0),
        ssm.stride(1),
        ssm.stride(2),
        weights.conv_weight.data_ptr(),
        weights.conv_weight.shape[1],
        0 if weights.conv_bias is None else weights.conv_bias.data_ptr(),
        weights.a.data_ptr(),
        weights.d.data_ptr(),
        weights.dt_bias.data_ptr(),
        weights.a.shape[0],
        weights.head_dim,
        weights.groups,
        weights.state_size,
        y.data_ptr(),
    )
