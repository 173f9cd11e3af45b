"""Steps that mean nothing, for everything that later steps launch to be compiled before the first request comes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from headrace.engine.request import MAX_TOP_LOGPROBS
from headrace.engine.run.padding import padded_sizes
from headrace.engine.schedule.plan import Chunk, SlotParams, Start, StepPlan
from headrace.engine.schedule.scheduler import Limits

ONE_GREEDY_TOKEN = SlotParams(1, 0.0, 1.0, 0, 0, thinking=False, budget=-1, ignore_eos=True)


def warm_up_plans(limits: Limits, vocab_size: int) -> Iterator[StepPlan]:
    """Decode steps of every padded size, of one row with all that a sampler can be asked for, then prompts.

    Prompts come in steps of 1, 2, 4, ... rows and of the most rows that there can be: launch parameters follow the
    rows by such steps. The decode rows are slots in which nothing ever started, see ``Runner``.
    """
    for size in padded_sizes(limits.num_slots):
        yield _decodes(limits, size)
    everything = ((0, np.ones(vocab_size, np.bool_)),)
    for masks in ((), everything):
        yield _decodes(limits, 1, masks=masks)
        yield _decodes(limits, 1, masks=masks, logprobs=True)
    for count in range(1, min(MAX_TOP_LOGPROBS, vocab_size) + 1):
        yield _decodes(limits, 1, logprobs=True, top_logprobs=count)
    longest = min(limits.prefill_chunk, limits.max_context - 1)
    most = min(limits.max_batched_tokens, limits.num_slots * longest)
    for rows in sorted({*(1 << power for power in range(most.bit_length())), most}):
        yield _prompts(limits, longest, rows)


def _decodes(limits: Limits, size: int, **sampling: object) -> StepPlan:
    slots = np.arange(size, dtype=np.int64)
    return StepPlan(0, slots, page_writes=_pages(limits, [1] * size), **sampling)  # type: ignore[arg-type]


def _prompts(limits: Limits, longest: int, rows: int) -> StepPlan:
    """Whole prompts in one step: ``rows`` tokens together, at most ``longest`` each."""
    lengths = [min(longest, rows - start) for start in range(0, rows, longest)]
    return StepPlan(
        0,
        np.empty(0, np.int64),
        chunks=tuple(Chunk(slot, 0, length, last=True) for slot, length in enumerate(lengths)),
        page_writes=_pages(limits, lengths),
        starts=tuple(Start(slot, np.zeros(n, np.int64), ONE_GREEDY_TOKEN) for slot, n in enumerate(lengths)),
    )


def _pages(limits: Limits, lengths: list[int]) -> np.ndarray:
    """Page writes for sequences of these lengths in slots 0, 1, ...

    Where there are not pages enough, sequences share them: they are alike, so they write the same.
    """
    counts = [-(-length // limits.page_size) for length in lengths]
    writes = [(slot, index) for slot, count in enumerate(counts) for index in range(count)]
    return np.array([(*write, page % limits.num_pages) for page, write in enumerate(writes)], np.int64)
