"""Shared memory of one CTA: what warps may see of each other's stores, copies still on their way, bank conflicts.

The executor runs all warps of a CTA in step, so a missing barrier would never show in the numbers. It shows here: every
granule remembers who wrote and who read it since the last barrier.
"""

from __future__ import annotations

import numpy as np

from headrace.kernels.lab.ptx.parse import Instruction, PtxError
from headrace.kernels.lab.ptx.statistics import Statistics
from headrace.kernels.lab.ptx.values import UNSIGNED, Array

BANKS = 32
WORD = 4  # bytes of a bank
SEVERAL = 63  # in place of a warp: more than one
EPOCH = 64  # marks are epoch * EPOCH + warp


class RaceError(PtxError):
    """Two warps met at one shared address with no barrier between them."""


class AsyncCopyError(PtxError):
    """Shared memory was used before the copy into it had been waited for."""


class SharedMemory:
    def __init__(self, size: int, granule: int, statistics: Statistics) -> None:
        """granule: bytes of the smallest access of the program, which divides all others."""
        self.size, self.granule, self.statistics = size, granule, statistics
        padded = -(-size // 128) * 128
        self.bytes = np.zeros(padded, np.uint8)
        self.views = {bits: self.bytes.view(kind) for bits, kind in UNSIGNED.items()}
        self.written = np.zeros(padded // granule, np.int32)
        self.read = np.zeros(padded // granule, np.int32)
        self.arriving = np.zeros(padded // granule, bool)
        self.epoch = 0
        self.passes: dict[tuple[int, bytes], tuple[int, int, int]] = {}

    def start_cta(self) -> None:
        self.bytes[:] = 0xFF  # uninitialised memory is NaN in every float format
        self.arriving[:] = False
        self.open: list[tuple[Array, Array, Array, int]] = []  # copies since the last commit
        self.groups: list[list[tuple[Array, Array, Array, int]]] = []
        self.barrier()

    def barrier(self) -> None:
        self.epoch += EPOCH

    # ------------------------------------------------------------------ accesses, [lanes] addresses

    def load(self, where: Instruction, addresses: Array, warps: Array, size: int, bits: int) -> Array:
        """Components [lanes, size * 8 / bits]."""
        marks = self._marks(where, addresses, size)
        self._check_arrived(where, marks)
        mine = self.epoch + warps[:, None]
        written = self.written[marks]
        if ((written >= self.epoch) & (written != mine) & (written != self.epoch + SEVERAL)).any():
            raise RaceError(f"read of what another warp wrote since the last barrier: {where.where}")
        before = self.read[marks]
        self.read[marks] = np.where((before >= self.epoch) & (before != mine), self.epoch + SEVERAL, mine)
        self._count_passes(addresses, warps, size)
        values: Array = self.views[bits][self._index(addresses, size, bits)]
        return values

    def store(self, where: Instruction, addresses: Array, warps: Array, values: Array, bits: int) -> None:
        """Write components [lanes, n]. Several warps may store the same value: Triton does where a layout is
        replicated."""
        size = values.shape[1] * bits // 8
        marks = self._marks(where, addresses, size)
        self._check_arrived(where, marks)
        index = self._index(addresses, size, bits)
        view = self.views[bits]
        same = (view[index] == values).all(1)
        mine = self.epoch + warps[:, None]
        written = self.written[marks]
        self._check_store(where, marks, mine, same)
        view[index] = values
        if (view[index] != values).any():
            raise RaceError(f"lanes store different values to one shared address: {where.where}")
        others = (written >= self.epoch) & (written != mine)
        self.written[marks] = np.where(others, self.epoch + SEVERAL, mine)
        shared_by_warps = self.written[marks] != mine
        if shared_by_warps.any():
            self.written[marks[shared_by_warps]] = self.epoch + SEVERAL
        self._count_passes(addresses, warps, size)

    def _check_store(self, where: Instruction, marks: Array, mine: Array, same: Array) -> None:
        written, read = self.written[marks], self.read[marks]
        clash = (written >= self.epoch) & (written != mine)
        clash |= (read >= self.epoch) & (read != mine)
        if (clash & ~same[:, None]).any():
            raise RaceError(f"store over what another warp wrote or read since the last barrier: {where.where}")

    # ------------------------------------------------------------------ asynchronous copies

    def copy(self, where: Instruction, addresses: Array, warps: Array, values: Array, bits: int, fetched: int) -> None:
        """Start a copy of components [lanes, n]; it lands as late as its wait allows. Until then the place is taken."""
        size = values.shape[1] * bits // 8
        marks = self._marks(where, addresses, size)
        self._check_store(where, marks, self.epoch + warps[:, None], np.zeros(len(addresses), bool))
        self._check_arrived(where, marks)
        self.arriving[marks] = True
        index = self._index(addresses, size * 1, bits)
        self.views[bits][index] = np.iinfo(UNSIGNED[bits]).max
        byte_index = addresses[:, None] + np.arange(size)
        self.open.append((byte_index, np.ascontiguousarray(values).view(np.uint8), marks, fetched))
        self.written[marks] = self.epoch + warps[:, None]

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, keep: int) -> int:
        """Deliver all but the last ``keep`` groups; returns how many bytes have come from memory."""
        fetched = 0
        while len(self.groups) > keep:
            fetched += self._deliver(self.groups.pop(0))
        return fetched

    def wait_all(self) -> int:
        self.commit()
        return self.wait(0)

    def _deliver(self, group: list[tuple[Array, Array, Array, int]]) -> int:
        total = 0
        for index, values, marks, fetched in group:
            self.bytes[index] = values
            self.arriving[marks] = False
            # Only the warp that waited sees it; the others do after the next barrier.
            self.written[marks] = self.epoch + self.written[marks] % EPOCH
            total += fetched
        return total

    # ------------------------------------------------------------------ checks and counts

    def _index(self, addresses: Array, size: int, bits: int) -> Array:
        index: Array = (addresses // (bits // 8))[:, None] + np.arange(size * 8 // bits)
        return index

    def _marks(self, where: Instruction, addresses: Array, size: int) -> Array:
        """Granules [lanes, size / granule] of an access. Raises PtxError out of bounds or misaligned."""
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.size:
            raise PtxError(f"out of the {self.size} bytes of shared memory: {where.where}")
        if (addresses & (size - 1)).any():
            raise PtxError(f"misaligned {size}-byte access to shared memory: {where.where}")
        marks: Array = (addresses // self.granule)[:, None] + np.arange(size // self.granule)
        return marks

    def _check_arrived(self, where: Instruction, marks: Array) -> None:
        if self.arriving[marks].any():
            raise AsyncCopyError(f"shared memory used before its asynchronous copy was waited for: {where.where}")

    def _count_passes(self, addresses: Array, warps: Array, size: int) -> None:
        """Passes depend on the pattern of addresses only, and loops repeat their patterns."""
        first = int(addresses[0]) // (BANKS * WORD) * (BANKS * WORD)
        key = (size, (addresses - first).tobytes() + warps.tobytes())
        found = self.passes.get(key)
        if found is None:
            found = self.passes[key] = _passes(addresses, warps, size)
        self.statistics.shared_requests += found[0]
        self.statistics.shared_passes += found[1]
        self.statistics.shared_least += found[2]


def _passes(addresses: Array, warps: Array, size: int) -> tuple[int, int, int]:
    """Requests, passes and conflict-free passes: a pass serves one distinct word of every bank."""
    requests = passes = least = 0
    for warp in np.unique(warps):
        starts = addresses[warps == warp]
        words = np.unique((starts[:, None] + np.arange(0, max(size, WORD), WORD)) // WORD)
        requests += 1
        passes += int(np.bincount(words % BANKS).max())
        least += -(-len(words) // BANKS)
    return requests, passes, least
