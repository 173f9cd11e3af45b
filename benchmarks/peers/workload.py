"""What is measured, the same for every peer. Runs in the peers' own environments: the standard library only."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]
Generate = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
"""(prompts as ids, new tokens) -> the new ids of each prompt, chosen greedily, no end of sequence."""

FIRST_ID = 3  # below are the special tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Decoding at each batch size and the prefill of one long prompt, on random ids."""

    vocab_size: int
    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 16
    new_tokens: int = 32
    prefill_tokens: int = 512

    @property
    def max_context(self) -> int:
        """The longest sequence, in tokens."""
        return max(self.prefill_tokens + 1, self.prompt_tokens + self.new_tokens + 1)


@dataclass(frozen=True, slots=True)
class Job:
    """One turn of a peer."""

    model: str  # the checkpoint's folder, or what the peer made of it
    format: str  # what the weights are kept in: "bf16", "f32"
    threads: int
    seed: int
    workload: Workload
    options: dict[str, Any] = field(default_factory=dict)  # the peer's own

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        workload = values.pop("workload")
        return cls(workload=Workload(**workload | {"batches": tuple(workload["batches"])}), **values)


def measure(generate: Generate, workload: Workload, seed: int) -> Iterator[Row]:
    """One row for each batch size, and one for the prefill.

    Decoding is what ``new_tokens`` further steps cost: the time for 1 + new_tokens tokens less the time for one.
    Every call gets prompts of its own, so that nothing is found in a cache. Raises ValueError where a peer returns
    another number of tokens than it was asked for, or the difference is not positive.
    """
    draw = random.Random(seed)

    def timed(batch: int, prompt_tokens: int, new_tokens: int) -> tuple[float, Sequence[Sequence[int]]]:
        ids = range(FIRST_ID, workload.vocab_size)
        prompts = [draw.choices(ids, k=prompt_tokens) for _ in range(batch)]
        start = time.perf_counter()
        answers = generate(prompts, new_tokens)
        seconds = time.perf_counter() - start
        if [len(answer) for answer in answers] != [new_tokens] * batch:
            got = [len(answer) for answer in answers]
            raise ValueError(f"asked for {batch} x {new_tokens} tokens, got {got}")
        return seconds, answers

    timed(1, workload.prompt_tokens, 4)  # what happens only once has happened
    for batch in workload.batches:
        first, _ = timed(batch, workload.prompt_tokens, 1)
        whole, answers = timed(batch, workload.prompt_tokens, 1 + workload.new_tokens)
        if whole <= first:
            raise ValueError(f"batch {batch}: {whole:.3f} s for all tokens, {first:.3f} s for the first alone")
        tokens = {token for answer in answers for token in answer}
        yield {
            **decode_row(workload, batch, whole - first),
            "distinct_tokens": len(tokens),  # few: the batch repeats itself, and experts are shared
        }
    seconds, _ = timed(1, workload.prefill_tokens, 1)
    yield prefill_row(workload, seconds)


def decode_row(workload: Workload, batch: int, seconds: float) -> Row:
    """The row of ``batch`` sequences that each decoded ``new_tokens`` tokens in so many seconds."""
    return {
        "measure": f"decode B={batch}",
        "batch": batch,
        "prompt_tokens": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "seconds": seconds,
        "tokens_per_s": batch * workload.new_tokens / seconds,
    }


def prefill_row(workload: Workload, seconds: float) -> Row:
    """The row of one long prompt."""
    return {
        "measure": f"prefill {workload.prefill_tokens}",
        "batch": 1,
        "prompt_tokens": workload.prefill_tokens,
        "new_tokens": 0,
        "seconds": seconds,
        "tokens_per_s": workload.prefill_tokens / seconds,
    }
