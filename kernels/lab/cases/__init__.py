"""Cases of the laboratory's table: what is compiled, counted and compared, per op, at sizes that matter.

Each module ``headrace.kernels.lab.cases.<op>`` defines ``CASES: tuple[Case, ...]``. A minimal one:

    def linear_case(batch: int) -> Case:
        def make() -> Callable[[], object]:
            x = torch.empty(batch, 4096, dtype=torch.bfloat16)   # CPU, never filled: pages stay uncommitted
            weight = torch.empty(4096, 4096, dtype=torch.bfloat16)
            return lambda: linear(x, weight)                     # the op itself, which launches its kernels
        return Case(
            name=f"linear 4096x4096 batch {batch}", op="linear 4096x4096", make=make,
            minimum_bytes=2 * 4096 * 4096 + 2 * 2 * batch * 4096,
            streamed=("weight",), most_bytes=1.10, steps=("BLOCK_K", "SPLITS"),
        )

    CASES = tuple(linear_case(batch) for batch in (1, 8, 32, 128))
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.kernels.lab.launches import Launch

ARCHITECTURES = (80, 90, 100, 120)

Cta = tuple[int, int, int]
Sample = Mapping[Cta, float]
"""CTAs to execute -> how many CTAs of the grid each of them stands for (itself included)."""


@dataclass(frozen=True)
class Case:
    """One op at one size. Names of arguments are the kernels' parameter names, whichever launch they appear in."""

    name: str  # unique over all ops; the table's row
    op: str  # cases of one op and weight shape, differing in batch only: they must share their numerics
    make: Callable[[], Callable[[], object]]
    """Build the inputs; the result runs the op once. Integers that steer the kernel (routes, page tables, lengths)
    must be real; weights and caches should be ``torch.empty``: what no executed CTA reads is never committed."""
    minimum_bytes: int | None = None  # what the op must move through memory at least; None: compiled, not executed
    most_bytes: float = 1.10  # highest allowed ratio of bytes moved to ``minimum_bytes``
    streamed: tuple[str, ...] = ()
    """Arguments read or written once (weights, states, keys and values, logits): every 32-byte sector requested
    counts. Of all other arguments each sector counts once a launch, since L2 serves the rest."""
    steps: tuple[str, ...] = ("BLOCK_K", "SPLITS")  # constexprs that must not follow the batch, where a kernel has them
    wide: tuple[str, ...] = ()  # arguments of which every load must be 128 bits a lane; defaults to ``streamed``
    least_in_flight: int = 0  # bytes in flight per SM that the streaming launch must reach
    sample: Callable[[Launch], Sample] | None = None
    """Which CTAs of a launch to execute, by role (a busy expert, an idle one). Default: all of a grid up to 16 CTAs,
    else 8 of them evenly spaced, each standing for an equal share."""
    architectures: tuple[int, ...] = field(default=ARCHITECTURES)

    def __post_init__(self) -> None:
        if self.minimum_bytes is not None and self.minimum_bytes <= 0:
            raise ValueError(f"{self.name}: minimum_bytes {self.minimum_bytes} is not positive")


def sampled(launch: Launch, *, whole: int = 16, few: int = 8) -> Sample:
    """The default choice of CTAs: every one of a small grid, ``few`` evenly spaced ones of a large grid."""
    total = launch.ctas
    chosen = range(total) if total <= whole else [(2 * i + 1) * total // (2 * few) for i in range(few)]
    return {coordinates(index, launch.grid): total / len(chosen) for index in chosen}


def coordinates(index: int, grid: Cta) -> Cta:
    """The CTA at ``index`` in launch order (x runs fastest)."""
    return index % grid[0], index // grid[0] % grid[1], index // (grid[0] * grid[1])


def modules() -> Sequence[str]:
    """Names of the case modules, in alphabetical order."""
    return [f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__)]


def collect() -> dict[str, Case]:
    """Every case by name. Raises ValueError if two share a name."""
    cases: dict[str, Case] = {}
    for module in modules():
        for case in importlib.import_module(module).CASES:
            if case.name in cases:
                raise ValueError(f"two cases are called {case.name!r}")
            cases[case.name] = case
    return cases
