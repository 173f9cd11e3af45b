"""Sequence: the live state of one choice of one request, as the scheduler sees it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from headrace.engine.schedule.plan import IntArray, SlotParams


class Status(enum.Enum):
    """Where a sequence is. WAITING also holds preempted ones."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Identity is the object; everything below ``sink`` is written by the scheduler alone.

    prompt      [tokens] ids; its length is at least 1
    sink        whoever receives the tokens; the scheduler hands it on and never looks at it
    logprobs    whether log-probabilities are wanted; top_logprobs the number of alternatives
    """

    prompt: IntArray
    params: SlotParams
    logprobs: bool = False
    top_logprobs: int = 0
    sink: Any = None

    status: Status = Status.WAITING
    arrival: int = -1  # order of submission; older sequences keep their place, younger ones are preempted
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # prompt tokens that are (or are planned to be) in the caches; decoding ones count in the batch
    length: int = 0  # tokens known when it left the decoding batch; prompt + decided
    saved_pages: int = -1  # pages held in host memory while preempted; -1: nothing is saved
    skip: int = 0  # tokens that a recomputation decides again and that were handed out before

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)
