"""What several kernels share on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mma(a, b, acc):
    """acc [1, M, N] fp32 + a [M, K] @ b [K, N], by mma.sync m16n8k16 on every architecture and for every tile.

    A dot of rank 3 never becomes wgmma or tcgen05, whose instruction would follow the tile: so M and N may follow the
    batch, and an element's bits depend on its row, its column and the order of K alone (design, section 3, rule 1).
    fp32 operands multiply in full precision.
    """
    return tl.dot(a[None, :, :], b[None, :, :], acc, input_precision="ieee")


@triton.jit
def last_to_arrive(counter, total):
    """Whether this program is the last of ``total`` to come by; what the others stored before is then visible to it.

    counter: pointer to an int32 that is 0 before the first arrival, and again after the last.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's atomic
    last = tl.atomic_add(counter, 1, sem="acq_rel") == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def warps_mma(a, b, acc):
    """acc [W, M, N] fp32 + a [W, M, K] @ b [K, N] with W = num_warps: a warp has M rows of its own, M >= 16.

    As ``mma``, for tiles of more than 32 rows. Triton 3.6 gives the batch of a dot to the warps, and repeats what they
    cannot share: a batch of one would be computed by every warp. Every warp reads all of b, which costs no memory.
    """
    return tl.dot(a, tl.broadcast_to(b[None, :, :], (a.shape[0], b.shape[0], b.shape[1])), acc, input_precision="ieee")
