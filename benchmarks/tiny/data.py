"""Training text as ids: conversations in Nemotron 3's format, effort and budget variants, packed rows.

Batches are a pure function of (seed, step, mixture), so a resumed run sees exactly the batches it would have seen.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from benchmarks.tiny import phrases, problems
from benchmarks.tiny.tokenizer import END_THINK, IM_END, IM_START, THINK, encode

ROW_TOKENS = 320
LOW_EFFORT = "\n\n{reasoning effort: low}"
EFFORTS = {"high": 0.70, "low": 0.17, "none": 0.13}
CUT_SHARE = 0.08
"""Share of high-effort examples whose reasoning is cut short, so that a forced end still gives a sane answer."""


WORD_WEIGHT = 10.0
"""Weight of the noun or name in a word problem's answer: one token in hundreds, and the only one to be fetched from
the question as a word, so at weight one it is learned last."""
LOW_WEIGHT = 2.5
"""Weight of low-effort completions: a few tokens each, with several steps of arithmetic behind every one."""


@dataclass(frozen=True)
class Example:
    """One conversation; `weights[i]` is how much producing `ids[i]` counts in the loss (0: not learned)."""

    ids: list[int]
    weights: list[float]

    @property
    def start(self) -> int:
        """Where the learned part begins."""
        return next(place for place, weight in enumerate(self.weights) if weight)


@dataclass(frozen=True)
class Batch:
    """Packed rows. `document` numbers the examples of a row (padding is -1); `targets` is -100 where not learned."""

    ids: torch.Tensor
    document: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(change(self.ids), change(self.document), change(self.targets), change(self.weights))


def prompt_ids(messages: tuple[problems.Message, ...], effort: str, bare_history: tuple[bool, ...] = ()) -> list[int]:
    """The ids of the chat template's prompt; `bare_history[i]` drops the newline before the i-th earlier answer."""
    turns = list(messages)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    ids = [IM_START, *encode(f"system\n{system}"), IM_END, *encode("\n")]
    answers = 0
    for index, turn in enumerate(turns):
        if turn["role"] == "user":
            tail = LOW_EFFORT if effort == "low" and index == len(turns) - 1 else ""
            ids += [IM_START, *encode(f"user\n{turn['content']}{tail}")]
        else:
            newline = "" if answers < len(bare_history) and bare_history[answers] else "\n"
            ids += [IM_START, *encode("assistant\n"), THINK, END_THINK, *encode(newline + turn["content"])]
            answers += 1
        ids += [IM_END, *encode("\n")]
    ids += [IM_START, *encode("assistant\n"), THINK]
    return ids + ([END_THINK] if effort == "none" else encode("\n"))


def completion(problem: problems.Problem, effort: str) -> list[int]:
    """The ids the model should generate after the prompt, up to and including the end of its turn."""
    if effort == "none":
        return [*encode(problem.answer), IM_END]
    trace = problem.trace_high if effort == "high" else problem.trace_low
    return [*encode(f"{trace}\n"), END_THINK, *encode(f"\n{problem.answer}"), IM_END]


def example(problem: problems.Problem, effort: str, bare_history: tuple[bool, ...] = ()) -> Example:
    """The whole conversation with only the last answer learned."""
    prompt = prompt_ids(problem.messages, effort, bare_history)
    answer = completion(problem, effort)
    weights = [LOW_WEIGHT if effort == "low" else 1.0] * len(answer)
    if problem.category == "word":
        said = encode(problem.answer)
        weights[-1 - len(said) : -1] = [1.0 if token in digits() else WORD_WEIGHT for token in said]
    return Example(prompt + answer, [0.0] * len(prompt) + weights)


@cache
def digits() -> frozenset[int]:
    return frozenset(encode("0123456789"))


def cut_short(rng: random.Random, whole: Example) -> Example:
    """Drop a random tail of the reasoning, as a budget would; only what follows the forced end is learned."""
    end = len(whole.ids) - 1 - whole.ids[::-1].index(END_THINK)
    cut = rng.randrange(whole.start, end)
    return Example(whole.ids[:cut] + whole.ids[end:], [0.0] * (cut + 1) + whole.weights[end + 1 :])


def with_history(rng: random.Random, problem: problems.Problem, names: list[str]) -> problems.Problem:
    """Put a system prompt and one or two earlier, unrelated turns before the question, some of the time."""
    messages = problem.messages
    if rng.random() < 0.12:
        for _ in range(rng.choice((1, 1, 2))):
            earlier = problems.draw(rng, rng.choice(names))
            messages = (*earlier.messages, {"role": "assistant", "content": earlier.answer}, *messages)
    if rng.random() < 0.15:
        messages = ({"role": "system", "content": phrases.system_prompt(rng)}, *messages)
    return replace(problem, messages=messages)


def sample(rng: random.Random, mixture: Mapping[str, float]) -> Example:
    """One training example."""
    names = list(mixture)
    problem = with_history(rng, problems.draw(rng, rng.choices(names, list(mixture.values()))[0]), names)
    effort = rng.choices(list(EFFORTS), list(EFFORTS.values()))[0]
    made = example(problem, effort, tuple(rng.random() < 0.5 for _ in problem.messages))
    return cut_short(rng, made) if effort == "high" and rng.random() < CUT_SHARE else made


def pack(examples: list[Example], row_tokens: int = ROW_TOKENS) -> list[list[Example]]:
    """First fit, in order; an example longer than a row is dropped."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for item in examples:
        size = len(item.ids)
        if size > row_tokens:
            continue
        index = next((index for index, free in enumerate(room) if size <= free), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[index].append(item)
        room[index] -= size
    return rows


def collate(rows: list[list[Example]], row_tokens: int = ROW_TOKENS) -> Batch:
    """Tensors of packed rows. The target of a position is the id after it in the same example."""
    ids = torch.zeros(len(rows), row_tokens, dtype=torch.long)
    document = torch.full_like(ids, -1)
    targets = torch.full_like(ids, -100)
    weights = torch.zeros(ids.shape)
    for index, row in enumerate(rows):
        at = 0
        for number, item in enumerate(row):
            end = at + len(item.ids)
            ids[index, at:end] = torch.tensor(item.ids)
            document[index, at:end] = number
            following = [token if weight else -100 for token, weight in zip(item.ids, item.weights, strict=True)]
            targets[index, at : end - 1] = torch.tensor(following[1:])
            weights[index, at : end - 1] = torch.tensor(item.weights[1:])
            at = end
    return Batch(ids, document, targets, weights)


def batch(seed: int, step: int, rows: int, mixture: Mapping[str, float]) -> Batch:
    """The batch of a step: enough examples for `rows` rows, of which the fullest are kept."""
    rng = random.Random(f"train/{seed}/{step}")
    examples: list[Example] = []
    tokens = 0
    while tokens < (rows + 1) * ROW_TOKENS:
        examples.append(sample(rng, mixture))
        tokens += len(examples[-1].ids)
    packed = sorted(pack(examples), key=lambda row: -sum(len(item.ids) for item in row))
    return collate(packed[:rows])
