"""Measure the embedded model through the engine itself and write its card.

    python -m benchmarks.tiny.evaluate                 accuracy, traces, budgets, MTP, talk -> engine/tiny/README.md
    python -m benchmarks.tiny.evaluate --problems 50   quicker; --no-write prints only

Problems are held out by their operands (``problems.is_held_out``); answers count as right only if they are exactly the
expected text. Decoding is greedy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.tiny import problems
from benchmarks.tiny.card import write_card
from benchmarks.tiny.problems import Message, Problem
from headrace.engine import ChatOptions, Completion, Delta, Engine, EngineConfig, Finished, SamplingParams
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.load import load_model
from headrace.engine.model.nemotron_h import NemotronH

MODEL = Path(__file__).resolve().parents[2] / "engine" / "tiny"
CATEGORIES = ("add", "sub", "mul", "mul3x2", "mul3x3", "sum", "compare", "word", "chat")
EFFORTS = ("high", "low", "none")
FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
CURVES = ("add", "mul3x2", "mul3x3", "sum")
AT_ONCE = 64
TALK: tuple[tuple[str, ...], ...] = (
    ("hello",),
    ("What is 47382 + 905?", "And 12 times 34?"),
    ("5 - 892",),
    ("What is 123456789 + 987654321?",),
    ("84 / 7",),
    ("What is the capital of France?",),
    ("asdf qwer zxcv",),
    ("Tom has 34 apples and buys 27 more. How many apples does he have?",),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answered problem."""

    right: bool
    reasoning_tokens: int
    ids: tuple[int, ...]  # decided tokens


@dataclass(frozen=True, slots=True)
class Score:
    """A category at one effort."""

    accuracy: float
    median_trace: float  # reasoning tokens


def ask_all(
    engine: Engine, questions: Sequence[Problem], effort: str = "high", budget: int = -1, label: str = ""
) -> list[Outcome]:
    """Greedy answers to all problems, as many at once as the engine decodes together."""
    params = SamplingParams(temperature=0.0, max_tokens=512, reasoning_budget=budget)
    outcomes = []
    for start in tqdm(range(0, len(questions), AT_ONCE), desc=f"{label:>9} {effort}", leave=False):
        part = questions[start : start + AT_ONCE]
        streams = [engine.chat_stream(p.messages, params, ChatOptions(effort)) for p in part]
        for problem, stream in zip(part, streams, strict=True):
            events = list(stream)
            text = "".join(e.text for e in events if isinstance(e, Delta) and e.channel == "content")
            usage = next(e.usage for e in events if isinstance(e, Finished))
            right = problems.is_right(problem, text)
            outcomes.append(Outcome(right, usage.reasoning_tokens, stream.token_ids[0]))
    return outcomes


def score(outcomes: Iterable[Outcome]) -> Score:
    """Accuracy and median trace."""
    found = list(outcomes)
    return Score(statistics.mean(o.right for o in found), statistics.median(o.reasoning_tokens for o in found))


def budget_curves(engine: Engine, count: int, seed: int, traces: dict[str, float]) -> dict[str, list[list[float]]]:
    """Per category [[budget in tokens, accuracy], ...] at fractions of its usual (median) trace."""
    curves = {}
    for category in CURVES:
        questions = problems.held_out(category, count, seed)
        points = []
        for fraction in FRACTIONS:
            budget = round(fraction * traces[category])
            points.append(
                [budget, score(ask_all(engine, questions, budget=budget, label=f"{category}@{budget}")).accuracy]
            )
        curves[category] = points
    return curves


def draft_agreement(model: NemotronH, prompt: Sequence[int], decided: Sequence[int]) -> tuple[int, int]:
    """(first drafts of the MTP head that equal the model's own greedy token, drafts), over decided positions."""
    if model.mtp is None:
        return 0, 0
    ids = torch.tensor([*prompt, *decided])
    none = torch.empty(0, dtype=torch.int64)
    caches = Caches.allocate(model.config, 1, 1, len(ids))
    table = torch.zeros(1, 1, dtype=torch.int32)
    hidden = model.forward(Batch(ids, none, none, (0,), (0,), (len(ids),), table, none), caches)
    greedy = model.logits(hidden).argmax(-1)  # [t]: the model's token t + 1
    drafts = model.logits(model.mtp.forward(hidden[:-1], ids[1:])).argmax(-1)  # [t]: the draft of token t + 2
    positions = range(len(prompt) - 1, len(ids) - 2)
    return sum(int(drafts[t] == greedy[t + 1]) for t in positions), len(positions)


def mtp_agreement(engine: Engine, model: NemotronH, answered: Sequence[tuple[Problem, Outcome]]) -> float:
    """Share of held-out positions at which the first draft is the model's next greedy token."""
    right = total = 0
    for problem, outcome in tqdm(answered, desc="MTP", leave=False):
        hits, drafts = draft_agreement(model, engine.prompt_ids(problem.messages).ids, outcome.ids)
        right, total = right + hits, total + drafts
    return right / max(1, total)


def talk(engine: Engine) -> list[list[tuple[str, Completion]]]:
    """The sample conversations, greedy at effort high; earlier turns as a client sends them back."""
    conversations = []
    for questions in TALK:
        messages: list[Message] = []
        turns = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            result = engine.chat(messages, SamplingParams(temperature=0.0, max_tokens=512))
            messages.append({"role": "assistant", "content": result.content or ""})
            turns.append((question, result))
        conversations.append(turns)
    return conversations


def digest(path: Path) -> str:
    """SHA-256 of a file: which weights the figures belong to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(path: Path, count: int, seed: int) -> dict[str, object]:
    """Everything the card says, as plain data."""
    scores: dict[str, dict[str, Score]] = {}
    answered: list[tuple[Problem, Outcome]] = []
    with Engine(path, EngineConfig(max_sequences=AT_ONCE)) as engine:
        for category in CATEGORIES:
            questions = problems.held_out(category, count, seed)
            scores[category] = {}
            for effort in EFFORTS:
                outcomes = ask_all(engine, questions, effort, label=category)
                scores[category][effort] = score(outcomes)
                if effort == "high":
                    answered += list(zip(questions, outcomes, strict=True))[: max(10, count // 8)]
        traces = {c: s["high"].median_trace for c, s in scores.items()}
        curves = budget_curves(engine, max(20, count // 2), seed + 1, traces)
        agreement = mtp_agreement(engine, load_model(path), answered)
        conversations = [
            [{"question": q, "reasoning": r.reasoning_content, "answer": r.content} for q, r in turns]
            for turns in talk(engine)
        ]
    return {
        "weights_sha256": digest(path / "model.safetensors"),
        "problems": count,
        "seed": seed,
        "scores": {
            c: {e: {"accuracy": s.accuracy, "median_trace": s.median_trace} for e, s in by_effort.items()}
            for c, by_effort in scores.items()
        },
        "curves": curves,
        "mtp_agreement": agreement,
        "talk": conversations,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--problems", type=int, default=400, help="held-out problems per category")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print the measurements, leave the card alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.model, args.problems, args.seed)
    print(json.dumps({k: v for k, v in found.items() if k != "talk"}, indent=1))
    if not args.no_write:
        write_card(args.model, found)


if __name__ == "__main__":
    main()
