"""Sizes that decode steps are padded to, so that steps of one size find all they read at the same addresses.

A padding row is a sequence of one token that has finished: the sampler decides nothing for it, so it cannot end, fail
or move on, and every step computes its one token from position 0 again. It has a slot and a page of its own, beyond
those that the scheduler knows of, and all such rows are alike, so they pick the same experts.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from itertools import pairwise

PADDED_BACKENDS = frozenset({"triton"})
"""Where a step's launches cost more than the rows that fill it up, and are to be replayed as a graph."""


@cache
def padded_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, ... as far as they are below ``most`` (at least 1), and ``most``.

    From 8 on a size is at most 7 rows too large; attention and projections take 8 rows at a time in any case.
    """
    return (*(size for size in (1, 2, 4, *range(8, most, 8)) if size < most), most)


def padded_size(rows: int, most: int) -> int:
    """The least size that holds ``rows`` <= ``most`` rows; 0 rows are not padded."""
    sizes = padded_sizes(most)
    return sizes[bisect_left(sizes, rows)] if rows else 0


def padding_rows(backend: str, most: int) -> int:
    """Padding rows that a step of at most ``most`` rows may need on this backend: the sizes' largest gap, or 0."""
    if backend not in PADDED_BACKENDS:
        return 0
    return max(next_size - size - 1 for size, next_size in pairwise((0, *padded_sizes(most))))
