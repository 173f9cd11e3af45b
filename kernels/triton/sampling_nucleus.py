"""The nucleus without a sort: a histogram of mass, and an exact search in the one bucket where top_p is reached.

A token's key is the bit pattern of its mass. A bucket holds the keys that agree in all but BUCKET_BITS bits, so equal
masses never part, and a bucket's masses differ by at most 1 / 16. The search then finds the remaining bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.sampling_tokens import key_of, mass_of, rank, token_noise

BUCKET_BITS = tl.constexpr(19)  # of the 23 bits of an octave: 2^4 buckets to each
BUCKET_STEP = tl.constexpr(1 << 19)  # from a bucket's first key to the next one's
BOTTOM = tl.constexpr(127 << 4)  # key >> BUCKET_BITS of the least mass, 1
BUCKETS = tl.constexpr(1024)  # used are 40 octaves of 2^4, and one for the likeliest token's mass of 2^40

PIVOTS = tl.constexpr(16)  # of a round of the search; each round narrows the keys by that factor
LIST_BLOCK = tl.constexpr(128)  # tokens of the list at a time; 256 would cost the kernel a fifth of its occupancy


@triton.jit
def add_to_histogram(histogram, mass, top_p, vocab):
    """Add the masses that can matter to the row's BUCKETS.

    Tokens lighter than the bound weigh, all together, less than half of (1 - top_p) of the total, which is at least
    2^40: without them top_p is reached all the same (64 allow for the rounding of what it needs). In a usual row this
    spares most tokens the atomic.
    """
    least = tl.maximum((1.0 - top_p) * 549755813888.0 / vocab - 64.0, 1.0).to(tl.float32)
    bucket = (key_of(mass) >> BUCKET_BITS) - BOTTOM
    tl.atomic_add(histogram + bucket, mass.to(tl.int64), mask=mass >= least, sem="relaxed")


@triton.jit
def find_bucket(histogram, total, top_p):
    """(lower, upper, needed): keys from upper on are kept; of those from lower on, as many as weigh ``needed``.

    Where rounding asks for more than the total, all are kept: both keys are 0.
    """
    target = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
    bucket = tl.arange(0, BUCKETS)
    mass = tl.load(histogram + bucket)
    chosen = tl.max(tl.where(tl.cumsum(mass, reverse=True) >= target, bucket, -1))
    needed = target - tl.sum(tl.where(bucket > chosen, mass, 0))
    lower = tl.where(chosen >= 0, (chosen + BOTTOM) << BUCKET_BITS, 0)
    upper = tl.where(chosen >= 0, lower + BUCKET_STEP, 0)
    return lower, upper, needed


@triton.jit
def append(chosen, index, scaled, length, list_index, list_scaled):
    """Append the chosen tokens of a tile to the row's list, whose ``length`` is in memory; the order means nothing."""
    size: tl.constexpr = chosen.numel
    flags = tl.reshape(chosen, [size]).to(tl.int32)
    start = tl.atomic_add(length, tl.sum(flags).to(tl.int64), sem="relaxed")
    place = start + tl.cumsum(flags) - flags
    tl.store(list_index + place, tl.reshape(index, [size]), mask=flags != 0)
    tl.store(list_scaled + place, tl.reshape(scaled, [size]), mask=flags != 0)


@triton.jit
def threshold_in(list_scaled, length, lower, needed):
    """The largest key such that the listed tokens from it on weigh at least ``needed``; it is at least ``lower``."""
    threshold = lower
    step = tl.zeros_like(lower) + BUCKET_STEP
    while step > 1:
        step = tl.maximum(step // PIVOTS, 1)
        pivot = tl.arange(0, PIVOTS) * step + threshold
        weight = tl.zeros([PIVOTS], tl.int64)
        for start in range(0, length, LIST_BLOCK):
            each = start + tl.arange(0, LIST_BLOCK)
            mass = mass_of(tl.load(list_scaled + each, mask=each < length, other=-float("inf")))
            reaches = key_of(mass)[:, None] >= pivot[None, :]
            weight += tl.sum(tl.where(reaches, mass.to(tl.int64)[:, None], 0), axis=0)
        threshold = tl.max(tl.where(weight >= needed, pivot, threshold))
    return threshold


@triton.jit
def best_listed(best, list_index, list_scaled, length, threshold, state, slot):
    """The rank of the best score among ``best`` and the listed tokens from the threshold on."""
    for start in range(0, length, LIST_BLOCK):
        each = start + tl.arange(0, LIST_BLOCK)
        index = tl.load(list_index + each, mask=each < length, other=0)
        scaled = tl.load(list_scaled + each, mask=each < length, other=-float("inf"))
        score = scaled + token_noise(index, state, slot)
        kept = key_of(mass_of(scaled)) >= threshold
        best = tl.maximum(best, tl.max(rank(tl.where(kept, score, -float("inf")), index)))
    return best
