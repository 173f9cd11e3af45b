"""RMS norm of rows; see ``kernels/norm.py`` for the contract."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.native.library import Op, Pool
from headrace.kernels.norm import Norm

RMS_NORM = Op("rms_norm", "qqqqqqdq")


def rms_norm(x: Tensor, norm: Norm, *, pool: Pool) -> Tensor:
    """As the reference's; the same bits as ``linear`` with that norm works on, for one input."""
    x = x if x.stride(1) == 1 else pool.contiguous(x)
    rows, columns = x.shape
    y = pool.empty(rows, columns)
    RMS_NORM(
        pool, pool.rows(x), x.stride(0), rows, columns, norm.groups, norm.weight.data_ptr(), norm.eps, y.data_ptr()
    )
    return y
