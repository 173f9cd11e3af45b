"""The engine thread: one thread owns scheduler and runner, everybody else sends mail.

A pass of the loop: read the mail (submissions, aborts), make a plan, run it, commit the result, hand the tokens to
their inboxes and wake whoever waits. Ids only: text is made by the reader of an inbox, in its own thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from headrace.engine.errors import EngineClosed, EngineFailed, QueueFull, trace
from headrace.engine.reasoning import BudgetMachine
from headrace.engine.request import Failure, Mask
from headrace.engine.run.device import DeviceLost
from headrace.engine.schedule.plan import StepPlan, StepResult
from headrace.engine.schedule.scheduler import Outcome, Scheduler
from headrace.engine.schedule.sequence import Sequence, Status
from headrace.engine.waiting import Waiter
from headrace.kernels.control import ControlIds, Finish, Phase

logger = logging.getLogger("headrace.engine")

STEP_SECONDS = 120.0
"""How long ``close`` waits for a step that is under way: steps of a big model on a CPU are slow."""


@dataclass(frozen=True, slots=True)
class Token:
    """One decided token on its way to the reader."""

    token_id: int
    phase: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """A sequence's one terminal event. ``error`` says why it failed, if it did, ``failure`` of what kind that is."""

    finish: Finish
    aborted: bool = False
    error: str | None = None
    failure: Failure | None = None


@dataclass(slots=True, eq=False)
class Inbox:
    """Where one sequence's tokens arrive: written by the engine thread, emptied by one reader.

    ``items`` holds Token, or a plain (id, phase) pair where no log-probability is wanted (the cheap form), and at the
    end one End. ``on_arrival`` is called on the engine thread after each item: it is how stop strings are found before
    the next step. It is None for requests without them, and once it has raised: the reader takes the rest itself.
    """

    waiter: Waiter
    items: deque[Token | tuple[int, int] | End] = field(default_factory=deque)
    on_arrival: Callable[[], None] | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # when it first got a slot

    @property
    def queue_seconds(self) -> float | None:
        """The wait for a slot; None if there never was one."""
        return None if self.admitted is None else self.admitted - self.submitted

    def put(self, item: Token | tuple[int, int] | End) -> None:
        """Deliver one item. Raises what ``on_arrival`` raises."""
        self.items.append(item)
        if self.on_arrival is not None:
            self.on_arrival()


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
        allowed = np.asarray(allowed)
        if allowed.shape != (vocab,) or allowed.dtype != np.bool_:
            raise ValueError(f"a mask must be bool ({vocab},), True = allowed; got {allowed.dtype} {allowed.shape}")
        return allowed


class Executor(Protocol):
    """What the loop needs of a runner."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out a plan."""


class EngineLoop:
    """Runs the steps on its own thread, which starts with the first submission and ends with ``close``.

    Every submitted sequence is in ``_live`` until its one End; both are under ``_condition``, so that closing, draining
    and faults miss nobody.
    """

    def __init__(self, scheduler: Scheduler, runner: Executor, max_waiting: int, vocab_size: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._max_live = max_waiting + scheduler.limits.num_slots
        self._max_waiting = max_waiting
        self._vocab_size = vocab_size
        self._mail: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._draining = False
        self.fault: str | None = None  # why the thread failed, if it did
        self._live: dict[Sequence, None] = {}  # in order of submission
        self._masks: dict[Sequence, MaskState] = {}
        self.steps = 0
        self._pass_began: float | None = None  # of the pass that is under way

    # --- from any thread ----------------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence], masks: list[MaskState] | None = None) -> None:
        """Queue sequences, all or none. Raises QueueFull or EngineClosed."""
        with self._condition:
            if self.fault is not None:
                raise EngineFailed(self.fault)
            if not self.accepting:
                raise EngineClosed("the engine is closed" if self._closing else "the engine is draining")
            # An idle engine takes a request of any number of choices; otherwise the limit is the limit.
            if self._live and len(self._live) + len(sequences) > self._max_live:
                raise QueueFull(max(0, len(self._live) - self._scheduler.limits.num_slots), self._max_waiting)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
                thread.start()
                self._thread = thread
            self._live.update(dict.fromkeys(sequences))
            self._mail.append(partial(self._receive, sequences, masks))
            self._condition.notify_all()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence before the next step; nothing happens if it has ended."""
        with self._condition:
            if sequence in self._live:
                self._mail.append(partial(self._abort, sequence))
                self._condition.notify_all()

    @property
    def accepting(self) -> bool:
        """Whether a submission would be taken, a full queue apart."""
        return not (self._closing or self._draining)

    @property
    def step_seconds(self) -> float:
        """How long the step that is under way has been running; 0 where there is none."""
        began = self._pass_began
        return 0.0 if began is None else time.monotonic() - began

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Stop taking requests; with ``drain`` let what was admitted finish (at most ``timeout`` seconds), then stop.

        What has not finished then ends as aborted. The thread is gone when this returns. Raises TimeoutError if a step
        that is under way does not end within STEP_SECONDS: no thread can be ended from outside.
        """
        with self._condition:
            self._draining = True
            if drain:
                self._condition.wait_for(lambda: self._closing or not self._live, timeout)
            self._closing = True
            thread = self._thread
            self._condition.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(STEP_SECONDS)
            if thread.is_alive():
                raise TimeoutError(f"the engine's step has not ended within {STEP_SECONDS:g} seconds")

    # --- on the engine thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        end = End(Finish.NONE, aborted=True)
        try:
            while self._read_mail():
                self._pass_began = time.monotonic()
                self._pass()
                self._pass_began = None
        except BaseException as error:  # a fault of ours, not of a step: nobody may wait for ever
            logger.error("the engine thread failed: %s", trace(error))
            self.fault = f"the engine failed: {error}"
            end = End(Finish.ERROR, error=self.fault, failure="engine")
        self._pass_began = None
        with self._condition:
            self._closing = True
            left = list(self._live)
        for sequence in left:
            self._end(sequence, end)

    def _pass(self) -> None:
        plan = self._scheduler.schedule()
        if plan is not None:
            if plan.starts:
                self._note_admissions()
            self._step(plan)

    def _read_mail(self) -> bool:
        """Take in the mail, sleeping while there is nothing to do; False once the loop is to end.

        Mail holds prompts: none of it is kept while the thread sleeps.
        """
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._mail or self._closing or not self._scheduler.idle)
                mail, self._mail = self._mail, deque()
                closing = self._closing
            while mail:
                mail.popleft()()
            if closing:
                return False
            if not self._scheduler.idle:
                return True

    def _receive(self, sequences: list[Sequence], masks: list[MaskState] | None) -> None:
        for i, sequence in enumerate(sequences):
            self._scheduler.submit(sequence)
            if masks:
                self._masks[sequence] = masks[i]

    def _note_admissions(self) -> None:
        now = time.monotonic()
        with self._condition:
            for sequence in self._live:
                if sequence.sink.admitted is None and sequence.status is not Status.WAITING:
                    sequence.sink.admitted = now

    def _abort(self, sequence: Sequence) -> None:
        if self._scheduler.abort(sequence):
            self._end(sequence, End(Finish.NONE, aborted=True))

    def _fail(self, sequence: Sequence, failure: Failure, error: str) -> None:
        self._scheduler.abort(sequence)
        self._end(sequence, End(Finish.ERROR, error=error, failure=failure))

    def _step(self, plan: StepPlan) -> None:
        try:
            if self._masks:
                plan = self._with_masks(plan)
            result = self._runner.execute(plan)
        except DeviceLost:  # no other step can succeed: the engine has failed
            raise
        except Exception as error:  # a kernel failed: its step is lost, the engine goes on
            logger.error("step %d failed: %s", plan.number, trace(error))
            victims = self._scheduler.fail_step()
            failure: Failure = "step" if len(victims) == 1 else "neighbours"
            for sequence in victims:
                self._end(sequence, End(Finish.ERROR, error=f"the step failed: {error}", failure=failure))
            return
        self.steps += 1
        self._publish(self._scheduler.commit(result))

    def _with_masks(self, plan: StepPlan) -> StepPlan:
        masks = []
        for row, sequence in enumerate(self._scheduler.rows()):
            state = self._masks.get(sequence)
            if state is None:
                continue
            try:
                allowed = state.allowed(sequence.skip, self._vocab_size)
            except BaseException as error:  # a user's mask, whatever it raises: it fails its request alone
                self._fail(sequence, "mask", f"the mask failed: {error!r}")
                continue
            if allowed is not None:
                masks.append((row, allowed))
        return replace(plan, masks=tuple(masks))

    def _publish(self, outcome: Outcome) -> None:
        """Hand tokens and ends to their inboxes, then wake each waiter once."""
        result = outcome.result
        tokens, phases = result.tokens.tolist(), result.phases.tolist()
        rich = result.logprobs is not None or bool(self._masks)
        waiters = set()
        for row, (sequence, token, phase) in enumerate(zip(outcome.rows, tokens, phases, strict=True)):
            if token < 0 or sequence not in self._live:
                continue
            if sequence.skip:
                sequence.skip -= 1
                continue
            inbox = sequence.sink
            item = self._token(sequence, row, token, phase, result) if rich else (token, phase)
            if inbox.on_arrival is None:
                inbox.items.append(item)
            else:
                self._put(sequence, item)
            waiters.add(inbox.waiter)
        for sequence, finish in outcome.finished:
            end = End(finish)
            if finish is Finish.ERROR:
                allows = ", or the mask allows no token" if sequence in self._masks else ""
                end = End(finish, error=f"the model's logits are not finite{allows}", failure="logits")
            self._end(sequence, end, wake=False)
            waiters.add(sequence.sink.waiter)
        for waiter in waiters:
            waiter.wake()

    def _put(self, sequence: Sequence, item: Token | tuple[int, int]) -> None:
        try:
            sequence.sink.put(item)
        except Exception as error:  # text could not be made of it: nobody else's concern
            logger.error("reading a sequence's tokens failed: %s", trace(error))
            sequence.sink.on_arrival = None
            self._fail(sequence, "text", f"reading its tokens failed: {error}")

    def _token(
        self, sequence: Sequence, row: int, token: int, phase: int, result: StepResult
    ) -> Token | tuple[int, int]:
        """The token with what its sequence wants to know about it."""
        if (state := self._masks.get(sequence)) is not None:
            state.append(token)
        if not sequence.logprobs or result.logprobs is None:
            return token, phase
        top: tuple[tuple[int, float], ...] = ()
        if sequence.top_logprobs and result.top_ids is not None and result.top_logprobs is not None:
            k = sequence.top_logprobs
            top = tuple(zip(result.top_ids[row, :k].tolist(), result.top_logprobs[row, :k].tolist(), strict=True))
        return Token(token, phase, float(result.logprobs[row]), top)

    def _end(self, sequence: Sequence, end: End, wake: bool = True) -> None:
        self._masks.pop(sequence, None)
        with self._condition:
            if sequence not in self._live:
                return
            del self._live[sequence]
            if not self._live:
                self._condition.notify_all()  # close() may be waiting for this
        try:
            sequence.sink.put(end)
        except Exception as error:  # it has taken the end, and made nothing of it
            logger.error("reading a sequence's end failed: %s", trace(error))
            sequence.sink.on_arrival = None
            sequence.sink.put(End(Finish.ERROR, error=f"reading its end failed: {error}", failure="text"))
        if wake:
            sequence.sink.waiter.wake()
