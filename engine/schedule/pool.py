"""A pool of integer ids: KV pages, or slots. The order in which ids come out depends on calls alone."""

from __future__ import annotations

from collections.abc import Iterable


class Pool:
    """Ids 0..size-1, each free or taken. Lowest ids first, then the most recently freed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of free ids."""
        return len(self._free)

    def take(self) -> int:
        """One id; the caller has checked that one is free."""
        return self._free.pop()

    def take_many(self, count: int) -> list[int]:
        """``count`` ids; the caller has checked that they are free."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, ids: Iterable[int]) -> None:
        """Free ids that were taken."""
        self._free.extend(ids)

    def check(self, held: Iterable[int]) -> None:
        """Conservation: free and held ids are disjoint and together are all of them. AssertionError otherwise."""
        everything = sorted([*self._free, *held])
        assert everything == list(range(self.size)), f"ids lost or held twice: {everything} of {self.size}"
