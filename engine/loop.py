"""The engine thread: one thread owns scheduler and runner, everybody else sends mail.

A pass of the loop: read the mail (submissions, aborts), make a plan, run it, commit the result, hand the tokens to
their inboxes and wake whoever waits. Ids only: text is made by the reader of an inbox, in its own thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from headrace.engine.errors import EngineClosed, QueueFull
from headrace.engine.reasoning import BudgetMachine
from headrace.engine.request import Mask
from headrace.engine.schedule.plan import StepPlan, StepResult
from headrace.engine.schedule.scheduler import Outcome, Scheduler
from headrace.engine.schedule.sequence import Sequence
from headrace.engine.waiting import Waiter
from headrace.kernels.control import ControlIds, Finish, Phase

logger = logging.getLogger("headrace.engine")


@dataclass(frozen=True, slots=True)
class Token:
    """One decided token on its way to the reader."""

    token_id: int
    phase: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """A sequence's one terminal event. ``error`` says why it failed, if it did."""

    finish: Finish
    aborted: bool = False
    error: str | None = None


@dataclass(slots=True, eq=False)
class Inbox:
    """Where one sequence's tokens arrive: written by the engine thread, emptied by one reader.

    ``items`` holds Token, or a plain (id, phase) pair where no log-probability is wanted (the cheap form), and at the
    end one End.
    """

    waiter: Waiter
    items: deque[Token | tuple[int, int] | End] = field(default_factory=deque)


class MaskState:
    """A masked sequence's ids and machine on the host, kept only because its mask asks for them."""

    def __init__(self, mask: Mask, control: ControlIds, thinking: bool, budget: int) -> None:
        self.mask = mask
        self.ids: list[int] = []
        self._start = partial(BudgetMachine.start, control, thinking, budget)
        self._machine = self._start()

    def append(self, token: int) -> None:
        """A token was decided for the first time."""
        self.ids.append(token)
        self._machine.advance(token)

    def allowed(self, skip: int, vocab: int) -> np.ndarray | None:
        """The mask of the next token; the last ``skip`` of ``ids`` are yet to be decided again. None: all allowed."""
        ids, machine = self.ids, self._machine
        if skip:
            ids, machine = ids[:-skip], self._start()
            for token in ids:
                machine.advance(token)
        if machine.forced() is not None:
            return None
        allowed = self.mask(tuple(ids), "reasoning" if machine.phase is Phase.THINKING else "content")
        if allowed is None:
            return None
        allowed = np.asarray(allowed, dtype=np.bool_)
        if allowed.shape != (vocab,):
            raise ValueError(f"a mask must have shape ({vocab},), got {allowed.shape}")
        return allowed


class Executor(Protocol):
    """What the loop needs of a runner."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out a plan."""


class EngineLoop:
    """Runs the steps on its own thread, which starts with the first submission and ends with ``close``."""

    def __init__(self, scheduler: Scheduler, runner: Executor, max_waiting: int, vocab_size: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._max_waiting = max_waiting
        self._vocab_size = vocab_size
        self._mail: deque[Callable[[], None]] = deque()
        self._queued = 0  # sequences in the mail
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._draining = False
        self._live: set[Sequence] = set()  # membership only; never iterated to decide an order
        self._masks: dict[int, MaskState] = {}  # arrival -> state
        self.steps = 0

    # --- from any thread ----------------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence], masks: list[MaskState] | None = None) -> None:
        """Queue sequences, all or none. Raises QueueFull or EngineClosed."""
        with self._condition:
            if self._closing or self._draining:
                raise EngineClosed("the engine is closed" if self._closing else "the engine is draining")
            waiting = self._scheduler.waiting + self._queued
            # An idle queue takes a request of any number of choices; otherwise the limit is the limit.
            if waiting and waiting + len(sequences) > self._max_waiting:
                raise QueueFull(waiting, self._max_waiting)
            self._queued += len(sequences)
            self._mail.append(lambda: self._receive(sequences, masks))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
                self._thread.start()
            self._condition.notify()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence before the next step; nothing happens if it has ended."""
        with self._condition:
            if self._thread is not None and not self._closing:
                self._mail.append(lambda: self._abort(sequence))
                self._condition.notify()

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Stop taking requests; with ``drain`` let what was admitted finish (at most ``timeout`` seconds), then stop.

        What has not finished then ends as aborted. The thread is gone when this returns.
        """
        with self._condition:
            self._draining = True
            if drain and self._thread is not None:
                self._condition.wait_for(lambda: not self._live and not self._mail, timeout)
            self._closing = True
            thread = self._thread
            self._condition.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def accepting(self) -> bool:
        """Whether a submission would be taken, a full queue apart."""
        return not (self._closing or self._draining)

    # --- on the engine thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._read_mail():
                plan = self._scheduler.schedule()
                if plan is not None:
                    self._step(plan)
            for sequence in [*self._live]:
                self._abort(sequence)
        except Exception as error:  # a fault of ours, not of a step: nobody may wait for ever
            logger.exception("the engine thread failed")
            with self._condition:
                self._closing = True
                mail, self._mail = self._mail, deque()
            for deliver in mail:
                deliver()
            for sequence in [*self._live]:
                self._end(sequence, End(Finish.ERROR, error=f"the engine failed: {error}"))

    def _read_mail(self) -> bool:
        """Take in the mail, sleeping while there is nothing to do; False once the loop is to end."""
        while True:
            with self._condition:
                while not (self._mail or self._scheduler.running or self._scheduler.waiting or self._closing):
                    self._condition.notify_all()  # close() may be waiting for this
                    self._condition.wait()
                mail = list(self._mail)
                self._mail.clear()
                closing = self._closing
            for deliver in mail:
                deliver()
            if closing:
                return False
            if self._scheduler.running or self._scheduler.waiting or not mail:
                return True

    def _receive(self, sequences: list[Sequence], masks: list[MaskState] | None) -> None:
        with self._condition:
            self._queued -= len(sequences)
        for i, sequence in enumerate(sequences):
            self._scheduler.submit(sequence)
            self._live.add(sequence)
            if masks:
                self._masks[sequence.arrival] = masks[i]

    def _abort(self, sequence: Sequence) -> None:
        if self._scheduler.abort(sequence):
            self._end(sequence, End(Finish.NONE, aborted=True))

    def _step(self, plan: StepPlan) -> None:
        try:
            if self._masks:
                plan = self._with_masks(plan)
            result = self._runner.execute(plan)
        except Exception as error:  # a kernel failed: its step is lost, the engine goes on
            logger.exception("step %d failed", plan.number)
            for sequence in self._scheduler.fail_step():
                self._end(sequence, End(Finish.ERROR, error=f"the step failed: {error}"))
            return
        self.steps += 1
        self._publish(self._scheduler.commit(result))

    def _with_masks(self, plan: StepPlan) -> StepPlan:
        masks = []
        for row, sequence in enumerate(self._scheduler.rows()):
            state = self._masks.get(sequence.arrival)
            if state is None:
                continue
            try:
                allowed = state.allowed(sequence.skip, self._vocab_size)
            except Exception as error:  # a user's mask: it fails its request alone
                self._scheduler.abort(sequence)
                self._end(sequence, End(Finish.ERROR, error=f"the mask failed: {error}"))
                continue
            if allowed is not None:
                masks.append((row, allowed))
        return replace(plan, masks=tuple(masks))

    def _publish(self, outcome: Outcome) -> None:
        """Hand tokens and ends to their inboxes, then wake each waiter once."""
        result = outcome.result
        tokens, phases = result.tokens.tolist(), result.phases.tolist()
        waiters = set()
        if result.logprobs is None and not self._masks:
            for sequence, token, phase in zip(outcome.rows, tokens, phases, strict=True):
                if token >= 0 and sequence in self._live:
                    if sequence.skip:
                        sequence.skip -= 1
                    else:
                        inbox = sequence.sink
                        inbox.items.append((token, phase))
                        waiters.add(inbox.waiter)
        else:
            for i, sequence in enumerate(outcome.rows):
                if tokens[i] >= 0 and sequence in self._live:
                    self._publish_rich(sequence, i, result)
                    waiters.add(sequence.sink.waiter)
        for sequence, finish in outcome.finished:
            error = None
            if finish is Finish.ERROR:
                error = "the model's logits are not finite, or a mask allows no token"
            self._end(sequence, End(finish, error=error), wake=False)
            waiters.add(sequence.sink.waiter)
        for waiter in waiters:
            waiter.wake()

    def _publish_rich(self, sequence: Sequence, row: int, result: StepResult) -> None:
        token = int(result.tokens[row])
        if sequence.skip:
            sequence.skip -= 1
            return
        if (state := self._masks.get(sequence.arrival)) is not None:
            state.append(token)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if sequence.logprobs and result.logprobs is not None:
            logprob = float(result.logprobs[row])
            if sequence.top_logprobs and result.top_ids is not None and result.top_logprobs is not None:
                k = sequence.top_logprobs
                top = tuple(zip(result.top_ids[row, :k].tolist(), result.top_logprobs[row, :k].tolist(), strict=True))
        sequence.sink.items.append(Token(token, int(result.phases[row]), logprob, top))

    def _end(self, sequence: Sequence, end: End, wake: bool = True) -> None:
        self._live.discard(sequence)
        self._masks.pop(sequence.arrival, None)
        sequence.sink.items.append(end)
        if wake:
            sequence.sink.waiter.wake()
