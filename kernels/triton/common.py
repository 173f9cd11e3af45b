"""What the kernels share: one instruction, one way to know that all others are done, and integers for the host.

Every product is mma.sync m16n8k16 (design, section 3, rule 1), so an element's bits depend on its row, its column and
the order of K alone, and tiles may follow the batch. A dot of rank 2 with at most 32 rows is that instruction on every
architecture, and so is one of rank 3, of any size; of rank 2 with 64 rows or more it would be wgmma or tcgen05. The
batch of a dot of rank 3 is given to the warps, one part of the tile each: Triton 3.6 repeats in every warp what a
smaller batch leaves over. fp32 operands multiply in full precision (``input_precision="ieee"``).
"""

from __future__ import annotations

import triton
import triton.language as tl


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own serves kernels too, which costs the host 1.5 us a call; so the next."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 from n on; n >= 1."""
    return 1 << (n - 1).bit_length()


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
