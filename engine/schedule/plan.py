"""StepPlan goes down to the runner, StepResult comes up: the only two things that pass between them.

A plan names slots, ranges and pages, never tokens: those live in per-slot arrays beside the caches, so the next plan
can be made before this one's result has been read. A prompt travels once, in the Start that opens its slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SlotParams:
    """The sampling state a slot starts with. ``budget`` < 0: no limit; ``seed`` is 64 bits, unsigned."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    choice: int
    thinking: bool
    budget: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Open a slot for a sequence: its prompt [tokens] and its sampling state."""

    slot: int
    prompt: IntArray
    params: SlotParams


@dataclass(frozen=True, slots=True)
class Save:
    """Copy a sequence's pages and slot to host memory under ``key``, before anything else in the step."""

    key: int
    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Restore:
    """Copy what was saved under ``key`` back, into these pages and this slot, and forget it."""

    key: int
    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [start, start + length) of a slot. Only the ``last`` chunk's sample counts; others have none."""

    slot: int
    start: int
    length: int
    last: bool


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One forward of the batch, in the order it is carried out: saves, drops, restores, starts, pages, forward.

    Rows that yield a token: the decode slots in order, then the slots of the last chunks in order.
    """

    number: int
    decode_slots: IntArray  # [D]; the same object for as long as the decoding batch does not change
    chunks: tuple[Chunk, ...] = ()
    page_writes: IntArray = field(default_factory=lambda: np.empty((0, 3), np.int64))  # [n, 3]: slot, index, page
    starts: tuple[Start, ...] = ()
    saves: tuple[Save, ...] = ()
    restores: tuple[Restore, ...] = ()
    drops: tuple[int, ...] = ()  # keys of saved sequences that ended
    logprobs: bool = False
    top_logprobs: int = 0
    masks: tuple[tuple[int, npt.NDArray[np.bool_]], ...] = ()  # (row that yields a token, [vocab] allowed)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What the rows that yield a token decided, in the plan's order. Token -1: the row decided nothing."""

    tokens: IntArray  # [R]
    phases: IntArray  # [R] kernels.control.Phase in which the token was decided
    finish: IntArray  # [R] kernels.control.Finish after it
    logprobs: npt.NDArray[np.float32] | None = None  # [R]
    top_ids: IntArray | None = None  # [R, k]
    top_logprobs: npt.NDArray[np.float32] | None = None  # [R, k]
