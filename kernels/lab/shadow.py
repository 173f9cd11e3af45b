"""Shadow memory of one launch: which view an address belongs to, who touched each element, and what orders two touches.

Plain numpy on addresses; it knows nothing of Triton. Every access gets a number. A program is a run of numbers, because
the interpreter runs programs one after the other, so "all that program q did up to access n" is the pair (q, n), and a
clock is a dictionary of such pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Clock = dict[int, int]

GRANULE = 16
"""Regions start at multiples of this many bytes, so that elements of every size are aligned in them."""

MOST_POSTPONED = 1 << 22
"""Lanes of reads that a region holds back: 48 MB of addresses and lanes."""


@dataclass(frozen=True)
class Finding:
    """One defect: its kind, the source line that shows it, the tensor, and what happened there."""

    kind: str
    place: str
    tensor: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind} in {self.tensor}: {self.detail}"


@dataclass(frozen=True)
class View:
    """The elements of one tensor argument: ``size`` bytes from ``start``, without the gaps that strides leave."""

    name: str
    start: int
    size: int
    element_size: int
    filled: Array | None
    """Which bytes belong to the view; None if all do."""

    @classmethod
    def of(cls, name: str, start: int, shape: Sequence[int], stride: Sequence[int], element_size: int) -> View:
        if 0 in shape:
            return cls(name, start, 0, element_size, None)
        steps = [(n, s) for n, s in zip(shape, stride, strict=True) if n > 1]
        size = (sum((n - 1) * s for n, s in steps) + 1) * element_size
        offsets = np.zeros(1, np.int64)
        for count, step in steps if size > int(np.prod(shape)) * element_size else ():
            offsets = (offsets[:, None] + np.arange(count) * step).ravel()
        if offsets.size == 1:
            return cls(name, start, size, element_size, None)
        filled = np.zeros(size, bool)
        filled[(offsets[:, None] * element_size + np.arange(element_size)).ravel()] = True
        return cls(name, start, size, element_size, filled)

    def holds(self, addresses: Array, size: int) -> Array:
        """For each address whether its ``size`` bytes belong to the view."""
        inside: Array = (addresses >= self.start) & (addresses + size <= self.start + self.size)
        if self.filled is not None:
            at = addresses[inside] - self.start
            inside[inside] = self.filled[at] & self.filled[at + size - 1]
        return inside

    def distance(self, address: int, size: int) -> str:
        """Where an access outside of the view lies."""
        if address < self.start:
            return f"{self.start - address} bytes before its start"
        if address + size > self.start + self.size:
            return f"{address + size - self.start - self.size} bytes past the end of its {self.size}"
        return f"in a gap between its elements, {address - self.start} bytes from its start"


class Region:
    """Memory that one or several overlapping views cover, one shadow entry for every element.

    ``writer`` is the access that wrote an element last (0: none yet). ``readers`` and ``atomics`` are histories since
    then (see ``Shadow._extend``). The lanes tell threads of one program apart. Most memory is never written, so reads
    are postponed, as (access, addresses, lanes), until the first write asks for them.
    """

    def __init__(self, start: int, end: int, element_size: int) -> None:
        self.start, self.end, self.element_size = start, end, element_size
        self.postponed: list[tuple[int, Array, Array]] = []
        count = -(-(end - start) // element_size)
        self.writer, self.write_lane, self.readers, self.read_lane, self.atomics = np.zeros((5, count), np.int32)
        self.written = self.has_atomics = False
        self.postponed_lanes = 0

    def elements(self, addresses: Array, lanes: Array, size: int) -> tuple[Array, Array]:
        """Index of every element that ``size`` bytes at the addresses touch, and the lane that touches it."""
        if size < self.element_size:
            self._refine(size)
        first = (addresses - self.start) >> (self.element_size.bit_length() - 1)
        if size == self.element_size:
            return first, lanes
        each = size // self.element_size
        return (first[:, None] + np.arange(each)).ravel(), np.repeat(lanes, each)

    def _refine(self, size: int) -> None:
        parts = self.element_size // size
        for name in ("writer", "write_lane", "readers", "read_lane", "atomics"):
            setattr(self, name, np.repeat(getattr(self, name), parts))
        self.element_size = size


def regions_of(views: Iterable[View]) -> list[Region]:
    """The memory under the views, in order; views that overlap share a region."""
    merged: list[tuple[int, int, int]] = []
    for view in sorted((v for v in views if v.size), key=lambda v: v.start):
        start = view.start // GRANULE * GRANULE
        end = -(-(view.start + view.size) // GRANULE) * GRANULE
        if merged and start < merged[-1][1]:
            before, until, size = merged.pop()
            merged.append((before, max(until, end), min(size, view.element_size)))
        else:
            merged.append((start, end, view.element_size))
    return [Region(*extent) for extent in merged]


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program: lanes are numbered through a block of ``shape``."""

    program: int
    place: str
    shape: tuple[int, ...]
    size: int
    """Bytes each lane touches."""


@dataclass(frozen=True)
class Ordering:
    """What an atomic does besides its arithmetic. A ``local`` one (scope cta) is atomic inside its program only."""

    acquires: bool
    releases: bool
    local: bool = False


def _distinct(stamps: Array) -> list[int]:
    """The values that occur, nearly always one."""
    first = stamps[0]
    return [int(first)] if (stamps == first).all() else [int(stamp) for stamp in np.unique(stamps)]


def _joined(clock: Clock, other: Clock) -> Clock:
    return clock | {program: max(stamp, clock.get(program, 0)) for program, stamp in other.items()}


@dataclass(frozen=True)
class Touch:
    """The part of an access that falls into one region: which elements, by which lanes."""

    access: Access
    region: Region
    at: Array
    lanes: Array

    def address(self, where: Array) -> int:
        """The first address among the elements that ``where`` selects."""
        return self.region.start + int(self.at[where][0]) * self.region.element_size


class Shadow:
    """The shadow memory of one launch, and the clock of the program that runs now."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = views
        self.starts = {view.start for view in views}
        self.regions = regions_of(views)
        self.findings: dict[tuple[str, str, str], Finding] = {}
        self.labels: list[str] = []
        self._accesses = [Access(-1, "", (), 0)]
        # History 0 is empty; history h is history _earlier[h], then access _latest[h]. Those of atomics carry clocks.
        self._earlier, self._latest = [0], [0]
        self._clocks: dict[int, tuple[Clock, Clock]] = {0: ({}, {})}

    # the running program

    def begin(self, label: str) -> None:
        """The next program starts. All it knows of the others it will take over from atomics."""
        self.labels.append(label)
        self.program = len(self.labels) - 1
        self._known: Clock = {}
        self._nearly_known: Clock = {}  # what it would know, had every release a barrier before it
        self.barrier()

    def barrier(self) -> None:
        """All threads of the program have done what came before."""
        self._settled = self._fence = len(self._accesses) - 1

    # accesses

    def in_bounds(self, kind: str, addresses: Array, origin: int | None, access: Access) -> Array | None:
        """Which lanes may go ahead, None if all. ``origin`` is where the view of the pointer starts, if known."""
        views = [view for view in self.views if view.start == origin] or self.views
        lowest, end = addresses.min(), addresses.max() + access.size
        aligned = np.bitwise_or.reduce(addresses) & (access.size - 1) == 0
        if aligned and any(v.filled is None and v.start <= lowest and end <= v.start + v.size for v in views):
            return None
        good = np.zeros(addresses.shape, bool)
        for view in views:
            good |= view.holds(addresses, access.size)
            if good.all():
                break
        else:
            self._out_of_bounds(kind, addresses, addresses[~good], views, access)
        misaligned = addresses % access.size != 0
        if misaligned.any():
            detail = f"program {self.labels[-1]} accesses {access.size} bytes at no multiple of {access.size}"
            self._report(f"misaligned {kind}", self.name(int(addresses[misaligned][0])), access, detail)
            good &= ~misaligned
        return None if good.all() else good

    def load(self, addresses: Array, lanes: Array, access: Access) -> None:
        """The lanes that are in bounds read their addresses."""
        number = self._number(access)
        for region, chosen in self._regions(addresses):
            region.postponed.append((number, addresses[chosen], lanes[chosen]))
            region.postponed_lanes += lanes.size
            if region.written or region.has_atomics:
                touch = self._touch(region, chosen, addresses, lanes, access)
                self._after_writes("reads", touch)
                self._after_atomics("reads", touch)
                self._catch_up(region)
            elif region.postponed_lanes > MOST_POSTPONED:
                self._catch_up(region)

    def _catch_up(self, region: Region) -> None:
        """Write postponed reads into the shadow."""
        for number, addresses, lanes in region.postponed:
            at, who = region.elements(addresses, lanes, self._accesses[number].size)
            region.readers[at] = self._extended(region.readers[at], number)
            region.read_lane[at] = who
        region.postponed.clear()
        region.postponed_lanes = 0

    def store(self, addresses: Array, lanes: Array, values: Array | None, access: Access) -> None:
        """``values``, if given, are searched for lanes that write different ones to the same address."""
        number = self._number(access)
        for region, chosen in self._regions(addresses):
            self._catch_up(region)
            touch = self._touch(region, chosen, addresses, lanes, access)
            self._after_writes("overwrites", touch)
            self._after_reads(touch)
            self._after_atomics("overwrites", touch)
            if values is not None:
                self._one_value_each(addresses[chosen], values[chosen], touch)
            region.writer[touch.at], region.write_lane[touch.at] = number, touch.lanes
            region.readers[touch.at] = region.atomics[touch.at] = 0
            region.written = True

    def atomic(self, addresses: Array, lanes: Array, ordering: Ordering, access: Access) -> None:
        """The lanes read and write their addresses, each in one piece."""
        if ordering.local:
            return self.store(addresses, lanes, None, access)
        number = self._number(access)
        for region, chosen in self._regions(addresses):
            self._catch_up(region)
            touch = self._touch(region, chosen, addresses, lanes, access)
            if ordering.acquires:
                for history in _distinct(region.atomics[touch.at]):
                    certain, nearly = self._clocks[history]
                    self._known = _joined(self._known, certain)
                    self._nearly_known = _joined(self._nearly_known, nearly)
            self._after_writes("changes", touch)
            self._after_reads(touch)
            region.atomics[touch.at] = self._extended(region.atomics[touch.at], number, ordering)
            region.has_atomics = True
        if ordering.acquires:  # the thread that did it hands its result to the others through a barrier
            self._settled = number

    def _number(self, access: Access) -> int:
        self._accesses.append(access)
        return len(self._accesses) - 1

    def _regions(self, addresses: Array) -> Iterator[tuple[Region, Array | slice]]:
        """The regions touched, and which of the addresses lie in each."""
        lowest, highest = addresses.min(), addresses.max()
        for region in self.regions:
            if region.start <= lowest and highest < region.end:
                yield region, slice(None)
                return
            inside = (addresses >= region.start) & (addresses < region.end)
            if inside.any():
                yield region, inside

    def _touch(self, region: Region, chosen: Array | slice, addresses: Array, lanes: Array, access: Access) -> Touch:
        return Touch(access, region, *region.elements(addresses[chosen], lanes[chosen], access.size))

    # histories

    def _extended(self, histories: Array, number: int, ordering: Ordering | None = None) -> Array | int:
        """The histories with access ``number`` added; a program's latest access replaces its one before."""
        distinct = _distinct(histories)
        if len(distinct) == 1:
            return self._extend(distinct[0], number, ordering)
        extended = np.array([self._extend(history, number, ordering) for history in distinct], np.int32)
        return extended[np.searchsorted(distinct, histories)]

    def _extend(self, history: int, number: int, ordering: Ordering | None) -> int:
        own = self._accesses[self._latest[history]].program == self._accesses[number].program
        self._earlier.append(self._earlier[history] if own else history)
        self._latest.append(number)
        new = len(self._latest) - 1
        if ordering is not None:  # an atomic that does not release hands on what was released before it
            certain, nearly = self._clocks[history]
            if ordering.releases:
                certain = _joined(_joined(certain, self._known), {self.program: self._fence})
                nearly = _joined(_joined(nearly, self._nearly_known), {self.program: number})
            self._clocks[new] = certain, nearly
        return new

    def _members(self, history: int) -> Iterator[int]:
        while history:
            yield self._latest[history]
            history = self._earlier[history]

    # conflicts

    def _after_writes(self, verb: str, touch: Touch) -> None:
        if touch.region.written:
            before = touch.region.write_lane[touch.at]
            self._against(
                f"{verb} what {{}} writes", touch.region.writer[touch.at], lambda n: (n,) if n else (), before, touch
            )

    def _after_reads(self, touch: Touch) -> None:
        before = touch.region.read_lane[touch.at]
        self._against("overwrites what {} reads", touch.region.readers[touch.at], self._members, before, touch)

    def _after_atomics(self, verb: str, touch: Touch) -> None:
        if not touch.region.has_atomics:
            return
        entries = touch.region.atomics[touch.at]
        for entry in _distinct(entries):
            for number in self._members(entry):
                past = self._accesses[number]
                # an atomic is its own release: it needs no barrier
                if past.program != self.program and number > self._nearly_known.get(past.program, 0):
                    self._race(f"{verb} what {{}} changes atomically", past, False, touch, entries == entry)

    def _against(
        self, clause: str, entries: Array, members: Callable[[int], Iterable[int]], before: Array, touch: Touch
    ) -> None:
        """Report the past accesses in ``entries``, one entry an element, that nothing orders before this one.

        ``before`` are the lanes that did them.
        """
        for entry in _distinct(entries):
            for number in members(entry):
                past = self._accesses[number]
                if past.program != self.program:
                    if number > self._known.get(past.program, 0):
                        nearly = number <= self._nearly_known.get(past.program, 0)
                        self._race(clause, past, nearly, touch, entries == entry)
                elif number > self._settled:
                    same = entries == entry
                    if past.shape != touch.access.shape or (before[same] != touch.lanes[same]).any():
                        self._thread_race(clause, past, touch, same)

    def _one_value_each(self, addresses: Array, values: Array, touch: Touch) -> None:
        """Of lanes that share an address one wins, and nobody knows which."""
        first = (addresses - touch.region.start) // touch.region.element_size
        lanes = np.arange(first.size, dtype=np.int32)
        touch.region.write_lane[first] = lanes
        winners = touch.region.write_lane[first]
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
        lost = bits != bits[winners]
        if lost.any():
            detail = (
                f"{lost.sum()} lanes of program {self.labels[-1]} store other values than lanes with the same address"
            )
            self._report("ambiguous store", self.name(int(addresses[lost][0])), touch.access, detail)

    # reports

    def name(self, address: int) -> str:
        """The views that hold the address."""
        return ", ".join(view.name for view in self.views if view.start <= address < view.start + view.size)

    def _out_of_bounds(self, kind: str, addresses: Array, bad: Array, views: Sequence[View], access: Access) -> None:
        def excess(view: View) -> int:
            return max(view.start - int(bad.min()), int(bad.max()) + access.size - view.start - view.size)

        nearest = min(views, key=excess, default=None)
        detail = f"{bad.size} of {addresses.size} lanes of program {self.labels[-1]}"
        if nearest is None:
            self._report(f"out-of-bounds {kind}", "no tensor", access, f"{detail}, and the launch has no tensor")
            return
        farthest = bad.min() if nearest.start - bad.min() > bad.max() - nearest.start - nearest.size else bad.max()
        detail += f", up to {nearest.distance(int(farthest), access.size)}"
        self._report(f"out-of-bounds {kind}", nearest.name, access, detail)

    def _race(self, clause: str, past: Access, nearly: bool, touch: Touch, where: Array) -> None:
        other = f"program {self.labels[past.program]} at {past.place}"
        why = "the release between them has no tl.debug_barrier() before it" if nearly else "nothing orders the two"
        detail = f"program {self.labels[-1]} {clause.format(other)}; {why}"
        self._report("race of programs", self.name(touch.address(where)), touch.access, detail)

    def _thread_race(self, clause: str, past: Access, touch: Touch, where: Array) -> None:
        clause = clause.format(f"another thread at {past.place}")
        detail = f"a thread of program {self.labels[-1]} {clause}; no tl.debug_barrier() between"
        self._report("race of threads", self.name(touch.address(where)), touch.access, detail)

    def _report(self, kind: str, tensor: str, access: Access, detail: str) -> None:
        self.findings.setdefault((kind, access.place, tensor), Finding(kind, access.place, tensor, detail))
