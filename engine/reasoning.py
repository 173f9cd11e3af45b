"""The token-budget state machine of a reasoning trace: the specification, in plain Python, of what the sampler does.

One machine follows one sequence. Before a token is decided, ``forced()`` says whether the machine dictates it; after
it is decided, by whichever way, ``advance(token)`` moves the machine. The sampling kernel
(``headrace.kernels.sampling``) does the same for all rows of a step on the device and is tested against this.

    OFF        nothing is ever forced: effort "none", raw prompts, models without think markers
    THINKING   ``remaining`` free tokens are left (negative: no limit)
    CLOSING    the closing ids are being forced, ``cursor`` is the next one
    ANSWERING  after the end of thinking; a second ``<think>`` goes back to THINKING with what is left
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.kernels.control import ControlIds, Phase


@dataclass(slots=True)
class BudgetMachine:
    """State of one sequence's reasoning. ``remaining`` counts free tokens, markers inside reasoning included."""

    control: ControlIds
    phase: Phase
    remaining: int
    cursor: int = 0

    @classmethod
    def start(cls, control: ControlIds, thinking: bool, budget: int) -> BudgetMachine:
        """The machine after a prompt; ``thinking`` says that the prompt ends inside an open think block."""
        return cls(control, Phase.THINKING if thinking and control.closing else Phase.OFF, budget)

    def forced(self) -> int | None:
        """The id that the next token must be, or None if it is free."""
        if self.phase is Phase.CLOSING:
            return self.control.closing[self.cursor]
        if self.phase is Phase.THINKING and self.remaining == 0:
            return self.control.closing[0]
        return None

    def advance(self, token: int) -> None:
        """Account for a decided token; a forced one must be the one that ``forced()`` named."""
        if (expected := self.forced()) is not None:
            if token != expected:
                raise ValueError(f"token {token} was decided where {expected} is forced")
            self.cursor = self.cursor + 1 if self.phase is Phase.CLOSING else 1
            self.phase = Phase.CLOSING
            if self.cursor == len(self.control.closing):
                self.phase, self.cursor = Phase.ANSWERING, 0
        elif self.phase is Phase.THINKING:
            if token in (self.control.end_think, self.control.tool_call):
                self.phase = Phase.ANSWERING
            elif self.remaining > 0:
                self.remaining -= 1
        elif self.phase is Phase.ANSWERING and token == self.control.think:
            self.phase = Phase.THINKING


REASONING_PHASES = (Phase.THINKING, Phase.CLOSING)
"""A token decided in one of these belongs to the reasoning channel, unless it is a tool call's marker."""


def reasoning_markers(control: ControlIds) -> frozenset[int]:
    """Ids that are not counted in ``reasoning_tokens``; every other token decided freely while thinking is."""
    return frozenset((control.think, control.end_think, control.tool_call, *control.eos))
