"""The budget machine and the per-slot counters on the device, one scalar program per row.

``headrace.engine.reasoning`` specifies the machine; ``headrace.kernels.sampling`` is the reference of this form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.control import Finish, Phase

THINKING = tl.constexpr(int(Phase.THINKING))
CLOSING = tl.constexpr(int(Phase.CLOSING))
ANSWERING = tl.constexpr(int(Phase.ANSWERING))
RUNNING = tl.constexpr(int(Finish.NONE))
STOP = tl.constexpr(int(Finish.STOP))
LENGTH = tl.constexpr(int(Finish.LENGTH))
ERROR = tl.constexpr(int(Finish.ERROR))

# Control ids in memory: think, end_think, tool_call, then the end-of-sequence ids, then the closing.
THINK = tl.constexpr(0)
END_THINK = tl.constexpr(1)
TOOL_CALL = tl.constexpr(2)
EOS = tl.constexpr(3)


@triton.jit
def is_closing(state, slot):
    """Whether the slot is closing, or thinking with nothing left."""
    phase = tl.load(state.phase + slot)
    return (phase == CLOSING) | ((phase == THINKING) & (tl.load(state.remaining + slot) == 0))


@triton.jit
def is_forced(state, slot, closing_count):
    """Whether the slot's next token is an id of the closing; a model without a closing forces nothing."""
    return (closing_count != 0) & is_closing(state, slot)


@triton.jit
def ids_out(state, slot):
    """How many ids of a closing are out already, if the slot is closing: none of one that begins now."""
    return tl.where(tl.load(state.phase + slot) == CLOSING, tl.load(state.cursor + slot), 0)


@triton.jit
def closing_id(state, slot, control, eos_count, closing_count):
    """The id that the machine dictates; only for a slot that is closing, where ``closing_count`` is not 0."""
    return tl.load(control + EOS + eos_count + tl.minimum(ids_out(state, slot), closing_count - 1))


@triton.jit
def advance(state, slot, token, control, eos_count, closing_count):
    """Account for ``token``, decided by whichever way: move machine and counters, return the slot's Finish."""
    phase = tl.load(state.phase + slot)
    remaining = tl.load(state.remaining + slot)
    closing = is_closing(state, slot)
    step = ids_out(state, slot) + 1
    free = (phase == THINKING) & (remaining != 0)
    ends = (token == tl.load(control + END_THINK)) | (token == tl.load(control + TOOL_CALL))
    closed = (closing & (step >= closing_count)) | (free & ends)
    reopened = (phase == ANSWERING) & (token == tl.load(control + THINK))

    next_phase = tl.where(closing, CLOSING, phase)
    next_phase = tl.where(closed, ANSWERING, next_phase)
    next_phase = tl.where(reopened, THINKING, next_phase)
    spent = tl.where(closed, 0, tl.where(free & (remaining > 0), 1, 0))
    left = tl.load(state.tokens_left + slot) - 1
    length = tl.load(state.length + slot)
    finish = tl.where(left <= 0, LENGTH, RUNNING).to(tl.int64)
    # A forced id that happens to be an end-of-sequence id is part of the closing, not an end.
    if (tl.load(state.ignore_eos + slot) == 0) & (closing == 0):
        for i in range(eos_count):
            finish = tl.where(token == tl.load(control + EOS + i), STOP, finish)

    tl.debug_barrier()  # every thread has read the slot's state before one thread changes it
    tl.store(state.phase + slot, next_phase)
    tl.store(state.remaining + slot, remaining - spent)
    tl.store(state.cursor + slot, tl.where(closed, 0, tl.where(closing, step, 0)))
    tl.store(state.last_token + slot, token)
    tl.store(state.tokens_left + slot, left)
    tl.store(state.length + slot, length + 1)
    return finish


@triton.jit
def conclude(token_out, finish_out, token, sound, state, slot, control, eos_count, closing_count):
    """Write what the row decided. A finished slot decides nothing, one whose logits are unsound fails."""
    finish = tl.load(state.finish + slot)
    decided = (finish == RUNNING) & sound
    if decided:
        finish = advance(state, slot, token, control, eos_count, closing_count)
    else:
        finish = tl.where(finish == RUNNING, ERROR, finish)
    tl.store(state.finish + slot, finish)
    tl.store(finish_out, finish)
    tl.store(token_out, tl.where(decided, token, -1))
