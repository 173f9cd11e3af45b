"""Continuous batching: which sequences run in the next step, with which pages and slots.

Order is first come, first served. A step holds one row for every decoding sequence and as many prompt tokens as the
token budget leaves. Prompts are cut only at multiples of the SSD chunk size. When pages run out the youngest running
sequence is preempted: its pages and slot are kept in host memory, or, where that is full, it is computed again (the
same tokens come out, and those already handed out are skipped).

Invariants: free + held = all, for pages and slots, after every call; a sequence holds a slot exactly while it is in
``_prefilling`` or ``_decoding`` (or in ``_limbo`` until the plans that name it are done); nothing here waits for a
result, so plans can be made ahead of results. Preemption alone wants all results in, because what it saves must be
what the host believes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from headrace.engine.schedule.plan import Chunk, IntArray, Restore, Save, Start, StepPlan, StepResult
from headrace.engine.schedule.pool import Pool
from headrace.engine.schedule.sequence import Sequence, Status
from headrace.kernels.control import Finish

NO_PAGES = np.empty((0, 3), np.int64)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes the scheduler works within. ``page_bytes`` and ``slot_bytes`` count host memory of a saved sequence."""

    num_slots: int
    num_pages: int
    page_size: int  # tokens
    prefill_chunk: int  # tokens, a multiple of boundary
    max_batched_tokens: int  # rows of a step
    boundary: int  # tokens: prompts are cut at multiples of it
    max_context: int  # tokens per sequence
    preempt_bytes: int = 0
    page_bytes: int = 0
    slot_bytes: int = 0

    def __post_init__(self) -> None:
        if self.prefill_chunk % self.boundary:
            raise ValueError(f"prefill_chunk {self.prefill_chunk} is not a multiple of the SSD chunk {self.boundary}")
        least = self.prefill_chunk + self.num_slots
        if self.max_batched_tokens < least:
            raise ValueError(
                f"max_batched_tokens is {self.max_batched_tokens}; it must be at least prefill_chunk + max_sequences "
                f"= {least}, so that every step can decode everything and still take a chunk"
            )
        if self.max_context > self.num_pages * self.page_size:
            raise ValueError(
                f"max_context {self.max_context} does not fit {self.num_pages} pages of {self.page_size} tokens"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A committed step: ``rows[i]`` decided ``result.tokens[i]``; ``finished`` ended by themselves, in row order."""

    rows: tuple[Sequence, ...]
    result: StepResult
    finished: tuple[tuple[Sequence, Finish], ...]


class Scheduler:
    """The policy. Not thread-safe: the engine thread owns it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.preemptions = 0
        self._pages = Pool(limits.num_pages)
        self._slots = Pool(limits.num_slots)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._lengths = np.empty(0, np.int64)  # [D] tokens each decoding sequence knows = index it decides next
        self._decode_slots = np.empty(0, np.int64)  # [D]
        self._decode_rows: tuple[Sequence, ...] = ()
        self._in_flight: deque[tuple[StepPlan, tuple[Sequence, ...]]] = deque()
        self._limbo: deque[tuple[int, Sequence]] = deque()  # released once that plan is done
        self._drops: list[int] = []
        self._saved_bytes = 0
        self._arrivals = 0
        self._plans = 0

    # --- what the loop asks -------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Sequences that hold no slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to plan for."""
        return not (self.running or self._waiting or self._drops)

    @property
    def free_pages(self) -> int:
        """Pages nobody holds."""
        return self._pages.free

    @property
    def free_slots(self) -> int:
        """Slots nobody holds."""
        return self._slots.free

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence whose prompt leaves room for a token (the caller has checked: ValueError otherwise)."""
        if not 0 < sequence.prompt_length < self.limits.max_context:
            raise ValueError(f"prompt of {sequence.prompt_length} tokens, context {self.limits.max_context}")
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> bool:
        """End a sequence now; False if it had ended already."""
        if sequence.status is Status.FINISHED:
            return False
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
            if sequence.saved_pages >= 0:
                self._forget(sequence)
                self._drops.append(sequence.arrival)
        else:
            self._leave([sequence])
            self._release(sequence)
        sequence.status = Status.FINISHED
        return True

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to do, or nothing before the results in flight are in."""
        page_writes: list[tuple[int, int, int]] = []
        saves: list[Save] = []
        preempted = self.preemptions
        if not self._grow(page_writes, saves):
            return None
        chunks = self._continue_prefill()
        starts, restores = ([], []) if self.preemptions > preempted else self._admit(chunks, page_writes)
        if not (self._decoding or chunks or saves or restores or self._drops):
            return None
        finals = [s for s in self._prefilling if s.cached == s.prompt_length]
        rows = (*self._decode_rows, *finals) if finals else self._decode_rows
        self._plans += 1
        plan = StepPlan(
            number=self._plans,
            decode_slots=self._decode_slots,
            chunks=tuple(chunks),
            page_writes=np.array(page_writes, np.int64) if page_writes else NO_PAGES,
            starts=tuple(starts),
            saves=tuple(saves),
            restores=tuple(restores),
            drops=tuple(self._drops),
            logprobs=any(s.logprobs for s in rows),
            top_logprobs=max((s.top_logprobs for s in rows), default=0),
        )
        self._drops.clear()
        self._in_flight.append((plan, rows))
        self._lengths += 1
        if finals:
            self._begin_decoding(finals)
        return plan

    def rows(self) -> tuple[Sequence, ...]:
        """The sequences behind the rows of the plan made last."""
        return self._in_flight[-1][1]

    def commit(self, result: StepResult) -> Outcome:
        """Take in the result of the oldest plan in flight."""
        plan, rows = self._in_flight.popleft()
        finished: list[tuple[Sequence, Finish]] = []
        for i in np.flatnonzero(result.finish):
            sequence = rows[i]
            if sequence.status is not Status.FINISHED:
                finished.append((sequence, Finish(int(result.finish[i]))))
        if finished:
            self._leave([s for s, _ in finished])
            for sequence, _ in finished:
                if sequence.status is Status.WAITING:
                    raise RuntimeError("a preempted sequence ended: preemption must wait for the results in flight")
                sequence.status = Status.FINISHED
                self._release(sequence)
        while self._limbo and self._limbo[0][0] <= plan.number:
            self._give_back(self._limbo.popleft()[1])
        return Outcome(rows, result, tuple(finished))

    def fail_step(self) -> list[Sequence]:
        """A step raised: nothing it planned can be trusted. Ends every sequence it could have touched."""
        victims = [*self._prefilling, *self._decoding, *(s for s in self._waiting if s.saved_pages >= 0)]
        for plan, _ in self._in_flight:  # what these were to forget, or to hand back, may not have happened
            self._drops += [*plan.drops, *(restore.key for restore in plan.restores)]
        self._in_flight.clear()
        for sequence in victims:
            self.abort(sequence)
        while self._limbo:
            self._give_back(self._limbo.popleft()[1])
        return victims

    def check(self) -> None:
        """Assert conservation of pages and slots."""
        holders = [*self._prefilling, *self._decoding, *(s for _, s in self._limbo)]
        self._pages.check(p for s in holders for p in s.pages)
        self._slots.check(s.slot for s in holders)
        assert all(s.slot == -1 and not s.pages for s in self._waiting)
        size = self.limits.page_size
        for sequence, length in zip(self._decoding, self._lengths.tolist(), strict=True):
            assert len(sequence.pages) * size >= length - 1, "a cached token without a page"

    # --- decoding -----------------------------------------------------------------------------------------------

    def _grow(self, page_writes: list[tuple[int, int, int]], saves: list[Save]) -> bool:
        """A page for each decoding sequence whose next token opens one. False: results must come in first."""
        size = self.limits.page_size
        opening = np.flatnonzero((self._lengths - 1) % size == 0)
        if not len(opening):
            return True
        needy = [self._decoding[i] for i in opening]
        if len(needy) > self._pages.free and self._in_flight:
            return False
        needy.sort(key=lambda s: s.arrival)
        for sequence in needy:
            while not self._pages.free and sequence.status is Status.DECODE:
                self._preempt(max((*self._prefilling, *self._decoding), key=lambda s: s.arrival), saves)
            if sequence.status is Status.DECODE:
                page = self._pages.take()
                page_writes.append((sequence.slot, len(sequence.pages), page))
                sequence.pages.append(page)
        return True

    def _begin_decoding(self, sequences: Iterable[Sequence]) -> None:
        joining = list(sequences)
        for sequence in joining:
            if sequence.status is Status.PREFILL:
                sequence.length = sequence.prompt_length + 1
                self._prefilling.remove(sequence)
            sequence.status = Status.DECODE
        lengths = [s.length for s in joining]
        self._set_decoding([*self._decoding, *joining], np.concatenate([self._lengths, np.array(lengths, np.int64)]))

    def _set_decoding(self, sequences: list[Sequence], lengths: IntArray) -> None:
        self._decoding = sequences
        self._decode_rows = tuple(sequences)
        self._lengths = lengths
        self._decode_slots = np.array([s.slot for s in sequences], np.int64)

    def _leave(self, sequences: list[Sequence]) -> None:
        """Take sequences out of the running lists; they keep pages and slot. Records their length."""
        leaving = set(map(id, sequences))
        self._prefilling = [s for s in self._prefilling if id(s) not in leaving]
        keep = [i for i, s in enumerate(self._decoding) if id(s) not in leaving]
        if len(keep) == len(self._decoding):
            return
        for sequence, length in zip(self._decoding, self._lengths.tolist(), strict=True):
            if id(sequence) in leaving:
                sequence.length = length
        self._set_decoding([self._decoding[i] for i in keep], self._lengths[keep])

    # --- preemption ---------------------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence, saves: list[Save]) -> None:
        """Send a running sequence back to the head of the queue, saved to host memory if it fits there."""
        decoding = sequence.status is Status.DECODE
        self._leave([sequence])
        self.preemptions += 1
        held = sequence.length - 1 if decoding else sequence.cached  # tokens in the caches
        pages = -(-held // self.limits.page_size)
        size = self._saved_size(pages)
        if held and self._saved_bytes + size <= self.limits.preempt_bytes:
            saves.append(Save(sequence.arrival, sequence.slot, tuple(sequence.pages[:pages])))
            sequence.saved_pages = pages
            self._saved_bytes += size
        else:
            sequence.skip += sequence.length - sequence.prompt_length if decoding else 0
            sequence.cached = sequence.length = 0
        sequence.status = Status.WAITING
        self._give_back(sequence)
        self._waiting.appendleft(sequence)

    def _saved_size(self, pages: int) -> int:
        return pages * self.limits.page_bytes + self.limits.slot_bytes

    def _forget(self, sequence: Sequence) -> None:
        self._saved_bytes -= self._saved_size(sequence.saved_pages)
        sequence.saved_pages = -1

    def _release(self, sequence: Sequence) -> None:
        """Give back pages and slot, as soon as no plan in flight names them."""
        if self._in_flight:
            self._limbo.append((self._in_flight[-1][0].number, sequence))
        else:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pages.give_back(reversed(sequence.pages))
        self._slots.give_back([sequence.slot])
        sequence.pages = []
        sequence.slot = -1

    # --- prompts ------------------------------------------------------------------------------------------------

    def _continue_prefill(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        left = self.limits.max_batched_tokens - len(self._decoding)
        for sequence in self._prefilling:
            left = self._take_chunk(sequence, left, chunks)
        return chunks

    def _take_chunk(self, sequence: Sequence, left: int, chunks: list[Chunk]) -> int:
        """Plan the sequence's next chunk within ``left`` rows; returns what is left then."""
        remaining = sequence.prompt_length - sequence.cached
        length = min(remaining, self.limits.prefill_chunk, left)
        if length < remaining:
            length -= length % self.limits.boundary
        if length:
            chunks.append(Chunk(sequence.slot, sequence.cached, length, length == remaining))
            sequence.cached += length
        return left - length

    def _admit(self, chunks: list[Chunk], page_writes: list[tuple[int, int, int]]) -> tuple[list[Start], list[Restore]]:
        """Let waiting sequences in while slots, pages and rows last."""
        starts: list[Start] = []
        restores: list[Restore] = []
        left = self.limits.max_batched_tokens - len(self._decoding) - sum(c.length for c in chunks)
        returning: list[Sequence] = []
        while self._waiting and self._slots.free and left > 0:
            sequence = self._waiting[0]
            saved = sequence.saved_pages >= 0
            decoding = saved and sequence.length > 0
            rows_fit = decoding or min(sequence.prompt_length - sequence.cached, self.limits.boundary) <= left
            needed = -(-max(sequence.prompt_length, sequence.length) // self.limits.page_size)
            # One page to spare, so that the newcomer is not the next victim; alone it needs none.
            spare = 1 if self.running or returning else 0
            if not rows_fit or needed + spare > self._pages.free:
                break
            self._waiting.popleft()
            sequence.slot = self._slots.take()
            sequence.pages = self._pages.take_many(needed)
            page_writes.extend((sequence.slot, i, page) for i, page in enumerate(sequence.pages))
            if saved:
                restores.append(Restore(sequence.arrival, sequence.slot, tuple(sequence.pages[: sequence.saved_pages])))
                self._forget(sequence)
            else:
                starts.append(Start(sequence.slot, sequence.prompt, sequence.params))
            if decoding:
                returning.append(sequence)
                left -= 1
            else:
                sequence.status = Status.PREFILL
                self._prefilling.append(sequence)
                left = self._take_chunk(sequence, left, chunks)
        if returning:
            self._begin_decoding(returning)
        return starts, restores
