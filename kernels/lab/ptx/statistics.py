"""What an execution counts, per launch and per argument."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from headrace.kernels.lab.ptx.values import Array

SECTOR = 32  # bytes: what L2 is asked for and DRAM is read in


@dataclass
class Traffic:
    """Loads or stores of one argument by the executed CTAs. ``weight`` of a CTA is how many CTAs it stands for."""

    requests: float = 0  # warp instructions
    bytes: float = 0  # sum over active lanes
    sectors: float = 0  # sum over requests of the distinct sectors of each: what leaves the SM where L1 does not help
    unique_per_cta: float = 0  # sum over CTAs of the distinct sectors of each
    touched: list[Array] = field(default_factory=list, repr=False)  # per executed CTA, its distinct sectors
    _pending: list[Array] = field(default_factory=list, repr=False)
    _running: list[int] = field(default_factory=lambda: [0, 0, 0], repr=False)

    def add(self, lanes: int, size: int, requests: int, sectors: int, touched: Array) -> None:
        running = self._running
        running[0] += requests
        running[1] += lanes * size
        running[2] += sectors
        self._pending.append(touched)

    def finish_cta(self, weight: float) -> None:
        if not self._pending:
            return
        requests, size, sectors = self._running
        unique = np.unique(np.concatenate(self._pending))
        self.requests += weight * requests
        self.bytes += weight * size
        self.sectors += weight * sectors
        self.unique_per_cta += weight * len(unique)
        self.touched.append(unique)
        self._pending, self._running = [], [0, 0, 0]

    @property
    def unique(self) -> int:
        """Distinct sectors over all executed CTAs."""
        return len(np.unique(np.concatenate(self.touched))) if self.touched else 0

    @property
    def efficiency(self) -> float:
        """Bytes asked for over bytes of the sectors they lie in; 1 is perfectly coalesced."""
        return self.bytes / (self.sectors * SECTOR) if self.sectors else 1.0


@dataclass
class Statistics:
    """One launch: the executed CTAs, each counted ``weight`` times where it stands for others."""

    executed: int = 0  # CTAs
    instructions: Counter[str] = field(default_factory=Counter)  # opcode -> warp instructions of the executed CTAs
    loads: dict[str, Traffic] = field(default_factory=dict)  # argument -> traffic
    stores: dict[str, Traffic] = field(default_factory=dict)
    extents: dict[str, int] = field(default_factory=dict)  # argument -> sectors its view extends over
    shared_requests: int = 0
    shared_passes: int = 0  # cycles of the shared-memory pipe, bank conflicts included
    shared_least: int = 0  # the same without any conflict
    peaks: list[tuple[float, int]] = field(default_factory=list)  # per executed CTA: weight, most bytes in flight

    @property
    def bytes_in_flight(self) -> int:
        """Most bytes a CTA had asked of memory at one time: global loads to registers not yet read (moves between
        registers are no reads), asynchronous copies not yet waited for; whole sectors. In the order of the PTX,
        which ptxas may still change."""
        return max((peak for _, peak in self.peaks), default=0)

    @property
    def busy_ctas(self) -> float:
        """CTAs of the grid that come to at least half of ``bytes_in_flight``: not those that find nothing to do."""
        return sum(weight for weight, peak in self.peaks if 2 * peak >= self.bytes_in_flight)

    def moved(self, streamed: tuple[str, ...]) -> float:
        """Bytes between the SMs and memory: every sector requested of streamed arguments, the distinct sectors of
        the others. Where only a sample of the CTAs ran, distinct sectors are estimated from above: as if no two
        CTAs shared any, but no more than the view has."""
        total = 0.0
        for traffic in (self.loads, self.stores):
            for name, counted in traffic.items():
                if name in streamed:
                    total += counted.sectors
                elif counted.unique_per_cta > sum(len(touched) for touched in counted.touched):
                    total += min(counted.unique_per_cta, self.extents[name])
                else:
                    total += counted.unique
        return total * SECTOR
