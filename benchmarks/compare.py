"""Is a backend right on this device, at these sizes? Every op beside its reference, on the same inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.ops import Sizes
from headrace.kernels import Kernels

FP32_LIMIT = 16 * 2.0**-24 * 10_000**0.5
"""Rounding is a random walk of steps of 2^-24; sums here have up to 10,000 terms, and 16 lengths is beyond any walk.

It also has room for Triton's prompt scan, whose operands are pairs of bf16 numbers (2^-17, see ``mamba_prefill``)."""

ROUNDING_LIMIT = 8 * 2.0**-9
"""A number rounded to bf16 moves by at most 2^-9 of itself, so a sum of independent ones, typically, by less than that
share of its root mean square; of 10^8 results none is 8 times as far off."""

PIECE = 1 << 24  # elements compared at a time: the fp64 copies of whole caches would not fit


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case, over all its numbers of rows."""

    case: Case
    error: float = 0.0  # the largest; NaN where there is one, inf where integers differ
    rows: int = 0  # where it was found
    same_rows: bool | None = None  # whether decode rows have the same bits in batches of all sizes; None: no answer
    failure: str = ""  # what was raised

    @property
    def limit(self) -> float:
        """The largest error that rounding explains."""
        return FP32_LIMIT + ROUNDING_LIMIT * math.sqrt(self.case.roundings)

    @property
    def word(self) -> str:
        if self.failure:
            return "FAILED"
        return "ok" if self.error <= self.limit and self.same_rows is not False else "WRONG"


def compare(
    kernels: Kernels, reference: Kernels, cases: Iterable[Case], device: torch.device, sizes: Sizes
) -> Iterator[Verdict]:
    """Each case that the backend has kernels for, in its own dtypes, and those of bf16 also in fp32."""
    for case in cases:
        if case.format not in kernels.formats:
            continue
        for one in (case, case.in_fp32):
            if one is not None:
                yield verdict(kernels, reference, one, device, sizes)


def verdict(kernels: Kernels, reference: Kernels, case: Case, device: torch.device, sizes: Sizes) -> Verdict:
    """One case, from the most rows to the fewest. Whatever is raised is part of the answer."""
    worst, at, same = 0.0, 0, None
    largest: Sequence[Tensor] = ()
    counts = sorted(odd(case.rows(sizes)), reverse=True)
    try:
        for rows in counts:
            out, advanced = _run(kernels, case, device, sizes, rows)
            expected = sum(_run(reference, case, device, sizes, rows, poison=False), ())
            found = error((*out, *advanced), expected)
            if not found <= worst:  # also true of a NaN
                worst, at = found, rows
            if case.group == "decode":
                if largest:
                    same = same is not False and same_rows(out, rows, largest, counts[0])
                else:
                    largest = out
            if math.isnan(worst):
                break
    except Exception as failure:  # the other cases are worth having
        text = f"{type(failure).__name__}: {failure}".replace("\n", " ")[:160]
        return Verdict(case, rows=rows, failure=text)
    return Verdict(case, worst, at, same)


def odd(counts: Sequence[int]) -> list[int]:
    """The counts, but no tile full: one fewer of each, beside the most and a single one."""
    return sorted({counts[-1], *(max(count - 1, 1) for count in counts)})


def _run(
    kernels: Kernels, case: Case, device: torch.device, sizes: Sizes, rows: int, poison: bool = True
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(results, what was advanced)."""
    with uninitialised_is_nan(poison):
        work = case.build(kernels, device, sizes, rows)
        return work.results(), work.advanced


@contextmanager
def uninitialised_is_nan(wanted: bool = True) -> Iterator[None]:
    """Memory of ``torch.empty`` is NaN inside (integers: the largest), not what a right kernel left there before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to what it should be, or to the root mean square of that; NaN where there is one.

    Relative to the larger of the two: what is near zero is a sum of terms that are not. Integers that differ are
    infinitely far apart: the next id is no better than any other. Raises ValueError if shapes or numbers of tensors
    differ.
    """
    if len(actual) != len(expected):
        raise ValueError(f"{len(actual)} results, expected {len(expected)}")
    worst = [0.0]
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        if not e.is_floating_point():
            worst.append(0.0 if torch.equal(a, e) else math.inf)
        elif e.numel():
            worst.append(_float_error(a.flatten(), e.flatten()))
    return float(torch.tensor(worst).max())  # torch's max hands a NaN on, Python's does not


def _float_error(a: Tensor, e: Tensor) -> float:
    pieces = range(0, e.numel(), PIECE)
    mean_square = sum(float(e[start : start + PIECE].double().square().sum()) for start in pieces) / e.numel()
    least = max(math.sqrt(mean_square), 1e-30)
    worst = torch.zeros((), dtype=torch.float64, device=e.device)
    for start in pieces:
        mine, theirs = (t[start : start + PIECE].double() for t in (a, e))
        worst = torch.maximum(worst, ((mine - theirs).abs() / theirs.abs().clamp(min=least)).max())
    return float(worst)


def same_rows(few: Sequence[Tensor], rows: int, many: Sequence[Tensor], most: int) -> bool:
    """Whether the results of ``rows`` sequences are, bit for bit, the first of those of ``most``."""
    pairs = zip(few, many, strict=True)
    return all(torch.equal(_bits(a), _bits(b[: b.shape[0] // most * rows])) for a, b in pairs)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32) if t.dtype == torch.float32 else t
