"""Vocabulary shared by the sampler and the host: phases, ends and control ids. Plain Python, no tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Phase(enum.IntEnum):
    """State of the budget machine; ``headrace.engine.reasoning`` specifies the transitions."""

    OFF = 0
    THINKING = 1
    CLOSING = 2
    ANSWERING = 3


class Finish(enum.IntEnum):
    """Why a slot stopped deciding tokens; NONE while it still does."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class ControlIds:
    """Token ids the sampler treats specially; -1 where the model has no such token.

    ``closing`` is the forced end of reasoning: any text, then ``end_think``. It is empty if and only if the model
    has no ``end_think``, and then no slot may leave Phase.OFF.
    """

    eos: tuple[int, ...]
    think: int = -1
    end_think: int = -1
    tool_call: int = -1
    closing: tuple[int, ...] = ()
