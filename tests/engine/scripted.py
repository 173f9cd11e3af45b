"""A device made of dictionaries: executes step plans, keeps its caches honestly, decides tokens by a script.

Every page entry remembers which token of which text was written there and the Mamba state is a chain over the tokens
taken in, so a page given to two sequences, a lost copy or a token fed twice shows as a wrong history at once.
"""

from dataclasses import dataclass, replace

import numpy as np

from headrace.engine.schedule.plan import SlotParams, StepPlan, StepResult
from headrace.engine.schedule.scheduler import Limits
from headrace.kernels.control import Finish, Phase


def params(max_tokens=10, seed=0, choice=0, **other) -> SlotParams:
    return SlotParams(max_tokens, 1.0, 1.0, seed, choice, other.pop("thinking", False), other.pop("budget", -1), True)


def limits(**sizes) -> Limits:
    defaults = dict(num_slots=4, num_pages=16, page_size=4, prefill_chunk=8, boundary=4, max_context=32)
    merged = {**defaults, **sizes}
    merged.setdefault("max_batched_tokens", merged["prefill_chunk"] + merged["num_slots"])
    return Limits(**merged)


def decide(history: tuple[int, ...], seed: int) -> int:
    """The scripted model: the token after ``history``. About one in thirteen is the end (token 0)."""
    return hash((history, seed)) % 13


def expected(prompt: tuple[int, ...], seed: int, max_tokens: int) -> tuple[list[int], Finish]:
    """What a sequence must yield, computed alone."""
    history, out = tuple(prompt), []
    while len(out) < max_tokens:
        out.append(decide(history, seed))
        history += (out[-1],)
        if out[-1] == 0:
            return out, Finish.STOP
    return out, Finish.LENGTH


@dataclass(frozen=True)
class SlotState:
    prompt: tuple[int, ...]
    params: SlotParams
    decided: tuple[int, ...] = ()
    taken: tuple[int, ...] = ()  # tokens the recurrent state has seen
    finish: Finish = Finish.NONE


class ScriptedRunner:
    """Executes plans; raises AssertionError as soon as a sequence's history is not what it must be."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots: dict[int, SlotState] = {}
        self.table: dict[tuple[int, int], int] = {}
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset) -> token
        self.saved: dict[int, tuple[SlotState, list[dict[int, int]]]] = {}
        self.fail_at: set[int] = set()
        self.executed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.executed += 1
        if self.executed in self.fail_at:
            raise RuntimeError("planted failure")
        assert len(set(plan.decode_slots.tolist())) == len(plan.decode_slots)
        rows = len(plan.decode_slots) + sum(c.length for c in plan.chunks)
        assert rows <= self.limits.max_batched_tokens
        self._move(plan)
        outcomes = [self._decode(slot) for slot in plan.decode_slots.tolist()]
        for chunk in plan.chunks:
            self._prefill(chunk)
            if chunk.last:
                outcomes.append(self._decide(chunk.slot))
        tokens, finishes = [o[0] for o in outcomes], [o[1] for o in outcomes]
        phases = np.full(len(tokens), int(Phase.OFF), np.int64)
        return StepResult(np.array(tokens, np.int64), phases, np.array(finishes, np.int64))

    def _move(self, plan: StepPlan) -> None:
        size = self.limits.page_size
        for save in plan.saves:
            contents = [{o: self.memory[p, o] for o in range(size) if (p, o) in self.memory} for p in save.pages]
            self.saved[save.key] = self.slots[save.slot], contents
        for key in plan.drops:
            self.saved.pop(key, None)
        for restore in plan.restores:
            self.slots[restore.slot], contents = self.saved.pop(restore.key)
            for page, content in zip(restore.pages, contents, strict=True):
                self.memory.update({(page, o): t for o, t in content.items()})
        for start in plan.starts:
            self.slots[start.slot] = SlotState(tuple(start.prompt.tolist()), start.params)
        for slot, index, page in plan.page_writes.tolist():
            assert 0 <= index <= -(-self.limits.max_context // size)
            self.table[slot, index] = page

    def _write(self, slot: int, position: int, token: int) -> None:
        page = self.table[slot, position // self.limits.page_size]
        self.memory[page, position % self.limits.page_size] = token
        self.slots[slot] = replace(self.slots[slot], taken=(*self.slots[slot].taken, token))

    def _read(self, slot: int, count: int) -> tuple[int, ...]:
        size = self.limits.page_size
        return tuple(self.memory[self.table[slot, i // size], i % size] for i in range(count))

    def _prefill(self, chunk) -> None:
        state = self.slots[chunk.slot]
        assert chunk.start % self.limits.boundary == 0
        assert chunk.last == (chunk.start + chunk.length == len(state.prompt))
        assert chunk.last or chunk.length % self.limits.boundary == 0
        if chunk.start == 0:
            self.slots[chunk.slot] = replace(state, taken=())
        for i in range(chunk.start, chunk.start + chunk.length):
            self._write(chunk.slot, i, state.prompt[i])

    def _decode(self, slot: int) -> tuple[int, Finish]:
        state = self.slots[slot]
        if state.finish is not Finish.NONE:
            return -1, state.finish
        self._write(slot, len(state.prompt) + len(state.decided) - 1, state.decided[-1])
        return self._decide(slot)

    def _decide(self, slot: int) -> tuple[int, Finish]:
        state = self.slots[slot]
        history = state.prompt + state.decided
        assert state.taken == history, "the recurrent state saw other tokens"
        assert self._read(slot, len(history)) == history, "the pages hold other tokens"
        token = decide(history, state.params.seed)
        decided = (*state.decided, token)
        finish = Finish.STOP if token == 0 else Finish.NONE
        if finish is Finish.NONE and len(decided) == state.params.max_tokens:
            finish = Finish.LENGTH
        self.slots[slot] = replace(state, decided=decided, finish=finish)
        return token, finish
