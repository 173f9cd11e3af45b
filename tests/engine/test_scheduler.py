"""The scheduler on a scripted device: everybody finishes with the right tokens, and nothing leaks."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted import ScriptedRunner, expected, limits, params

from headrace.engine.schedule.scheduler import Limits, Scheduler
from headrace.engine.schedule.sequence import Sequence, Status
from headrace.kernels.control import Finish


def sequence(length: int, max_tokens: int = 10, seed: int = 0) -> Sequence:
    prompt = np.array([(7 * i + seed) % 11 + 1 for i in range(length)], np.int64)
    return Sequence(prompt, params(max_tokens, seed))


def lasting(count: int, length: int, max_tokens: int) -> list[Sequence]:
    """Sequences whose script runs to max_tokens, so that they press on the pool."""
    found: list[Sequence] = []
    for seed in range(10**6):
        s = sequence(length, max_tokens, seed)
        if expected(tuple(s.prompt.tolist()), seed, max_tokens)[1] is Finish.LENGTH:
            found.append(s)
            if len(found) == count:
                return found
    raise AssertionError("no such script")


class Harness:
    """Scheduler + scripted device with ``ahead`` plans in flight before a result is read."""

    def __init__(self, sizes: Limits, ahead: int = 0) -> None:
        self.scheduler = Scheduler(sizes)
        self.runner = ScriptedRunner(sizes)
        self.ahead = ahead
        self.pending = []
        self.tokens: dict[Sequence, list[int]] = defaultdict(list)
        self.ends: dict[Sequence, Finish | str] = {}
        self.steps = 0

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.pending.append(self.runner.execute(plan))
            self.steps += 1
        self.scheduler.check()
        if self.pending and (plan is None or len(self.pending) > self.ahead):
            self.commit()
        return bool(self.pending or self.scheduler.running or self.scheduler.waiting)

    def commit(self) -> None:
        outcome = self.scheduler.commit(self.pending.pop(0))
        for seq, token in zip(outcome.rows, outcome.result.tokens.tolist(), strict=True):
            if token >= 0 and seq not in self.ends:
                if seq.skip:
                    seq.skip -= 1
                else:
                    self.tokens[seq].append(token)
        for seq, finish in outcome.finished:
            assert seq not in self.ends, "a second terminal event"
            self.ends[seq] = finish
        self.scheduler.check()

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("not finished")

    def check_result(self, seq: Sequence) -> None:
        tokens, finish = expected(tuple(seq.prompt.tolist()), seq.params.seed, seq.params.max_tokens)
        assert self.tokens[seq] == tokens
        assert self.ends[seq] is finish

    def check_empty(self) -> None:
        assert self.scheduler.free_pages == self.scheduler.limits.num_pages
        assert self.scheduler.free_slots == self.scheduler.limits.num_slots
        assert self.scheduler._saved_bytes == 0
        assert self.scheduler.running == self.scheduler.waiting == 0


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("preempt_bytes", [0, 60, 10**6])
def test_tight_pools_preempt_and_everybody_gets_the_same_tokens(ahead, preempt_bytes):
    h = Harness(
        limits(num_slots=6, num_pages=9, max_context=32, preempt_bytes=preempt_bytes, page_bytes=10, slot_bytes=5),
        ahead,
    )
    seqs = [sequence(3 + i % 9, max_tokens=6 + i % 15, seed=i) for i in range(40)]
    for s in seqs:
        h.scheduler.submit(s)
    h.run()
    for s in seqs:
        h.check_result(s)
    h.check_empty()
    assert h.scheduler.preemptions > 0
    assert not h.runner.saved


def test_chunks_and_decodes_share_a_step():
    h = Harness(limits(num_slots=3, num_pages=40, prefill_chunk=8, max_context=64))
    (first,), second = lasting(1, 2, max_tokens=30), sequence(30, max_tokens=5, seed=2)
    h.scheduler.submit(first)
    h.step()
    h.scheduler.submit(second)
    plan = h.scheduler.schedule()
    assert len(plan.decode_slots) == 1
    assert [(c.start, c.length, c.last) for c in plan.chunks] == [(0, 8, False)]
    h.pending.append(h.runner.execute(plan))
    h.commit()
    h.run()
    h.check_result(first)
    h.check_result(second)


def test_the_decode_arrays_are_reused_while_the_batch_does_not_change():
    h = Harness(limits(num_pages=32, max_context=64))
    for s in lasting(3, 4, max_tokens=20):
        h.scheduler.submit(s)
    h.step()
    h.step()
    one, rows = h.scheduler.schedule(), h.scheduler.rows()
    h.pending.append(h.runner.execute(one))
    h.commit()
    two = h.scheduler.schedule()
    assert two.decode_slots is one.decode_slots
    assert h.scheduler.rows() is rows


def test_the_oldest_is_never_preempted_and_order_of_admission_is_kept():
    h = Harness(limits(num_slots=4, num_pages=8, max_context=32))
    seqs = lasting(6, 8, max_tokens=20)
    for s in seqs:
        h.scheduler.submit(s)
    while h.step():
        running = [s for s in seqs if s.status in (Status.PREFILL, Status.DECODE)]
        unfinished = [s for s in seqs if s.status is not Status.FINISHED]
        if running:
            assert min(running, key=lambda s: s.arrival) is min(unfinished, key=lambda s: s.arrival)
    for s in seqs:
        h.check_result(s)


def test_abort_frees_at_once_wherever_the_sequence_is():
    h = Harness(limits(num_slots=2, num_pages=8, prefill_chunk=4, max_context=32))
    seqs = [sequence(12, seed=i) for i in range(4)]
    for s in seqs:
        h.scheduler.submit(s)
    h.step()  # both slots are in the middle of their prompts
    assert h.scheduler.abort(seqs[0])
    assert not h.scheduler.abort(seqs[0])
    assert h.scheduler.abort(seqs[3])  # still queued
    h.scheduler.check()
    h.run()
    for s in seqs[1:3]:
        h.check_result(s)
    assert seqs[0] not in h.ends
    h.check_empty()


def test_abort_of_a_preempted_sequence_drops_its_copy():
    h = Harness(limits(num_slots=3, num_pages=6, max_context=24, preempt_bytes=10**6, page_bytes=1, slot_bytes=1))
    seqs = lasting(3, 7, max_tokens=16)
    for s in seqs:
        h.scheduler.submit(s)
    while not h.runner.saved:
        assert h.step()
    victim = next(s for s in seqs if s.saved_pages >= 0)
    h.scheduler.abort(victim)
    h.run()
    assert not h.runner.saved
    h.check_empty()


def test_a_failed_step_ends_what_it_could_have_touched_and_nothing_else():
    h = Harness(limits(num_slots=2, num_pages=16, max_context=32))
    seqs = [sequence(4, seed=i) for i in range(5)]
    for s in seqs:
        h.scheduler.submit(s)
    h.step()
    h.runner.fail_at = {h.runner.executed + 1}
    plan = h.scheduler.schedule()
    with pytest.raises(RuntimeError):
        h.runner.execute(plan)
    assert {id(s) for s in h.scheduler.fail_step()} == {id(s) for s in seqs[:2]}
    h.scheduler.check()
    h.run()
    for s in seqs[2:]:
        h.check_result(s)
    h.check_empty()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"max_batched_tokens": 11}, "max_batched_tokens is 11"),
        ({"prefill_chunk": 6, "boundary": 4}, "prefill_chunk 6"),
        ({"num_pages": 7}, "max_context 32"),
    ],
)
def test_impossible_limits_are_refused_by_name(sizes, words):
    with pytest.raises(ValueError, match=words):
        limits(**sizes)


def test_a_prompt_that_can_never_fit_is_refused():
    scheduler = Scheduler(limits(max_context=32))
    for length in (0, 32, 100):
        with pytest.raises(ValueError, match="prompt of"):
            scheduler.submit(sequence(length))


class RandomLife(RuleBasedStateMachine):
    """Random arrivals, aborts and steps in tiny pools, with results read late or at once."""

    @initialize(
        slots=st.integers(1, 5),
        pages=st.integers(6, 14),
        ahead=st.integers(0, 2),
        host=st.sampled_from([0, 30, 10**6]),
        chunk=st.sampled_from([4, 8, 12]),
    )
    def start(self, slots, pages, ahead, host, chunk):
        sizes = limits(
            num_slots=slots, num_pages=pages, prefill_chunk=chunk, max_context=24, preempt_bytes=host, page_bytes=5,
            slot_bytes=5,
        )  # fmt: skip
        self.h = Harness(sizes, ahead)
        self.seqs: list[Sequence] = []
        self.aborted: set[Sequence] = set()

    @rule(length=st.integers(1, 22), max_tokens=st.integers(1, 22), seed=st.integers(0, 10**6))
    def submit(self, length, max_tokens, seed):
        s = sequence(length, min(max_tokens, 24 - length), seed)
        self.seqs.append(s)
        self.h.scheduler.submit(s)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def abort(self, data):
        s = data.draw(st.sampled_from(self.seqs))
        if self.h.scheduler.abort(s):
            self.aborted.add(s)

    @precondition(lambda self: hasattr(self, "h") and not self.h.pending)
    @rule()
    def failing_step(self):
        plan = self.h.scheduler.schedule()
        if plan is None:
            return
        self.h.runner.fail_at = {self.h.runner.executed + 1}
        with pytest.raises(RuntimeError):
            self.h.runner.execute(plan)
        self.aborted.update(self.h.scheduler.fail_step())

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.h.step()

    @invariant()
    def conserved(self):
        if hasattr(self, "h"):
            self.h.scheduler.check()

    def teardown(self):
        if not hasattr(self, "h"):
            return
        self.h.run()
        for s in self.seqs:
            if s in self.aborted:
                tokens, _ = expected(tuple(s.prompt.tolist()), s.params.seed, s.params.max_tokens)
                assert self.h.tokens[s] == tokens[: len(self.h.tokens[s])]
            else:
                self.h.check_result(s)
        self.h.check_empty()
        assert not self.h.runner.saved


TestRandomLife = RandomLife.TestCase
TestRandomLife.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
