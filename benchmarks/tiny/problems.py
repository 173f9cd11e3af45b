"""Problems with their wording, worked traces and answers, and the split into training and held-out operands."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.tiny import phrases, traces

CATEGORIES = {
    "add": 15.0,
    "sub": 15.0,
    "mul": 8.0,
    "mul3x2": 10.0,
    "mul3x3": 13.0,
    "sum": 11.0,
    "compare": 6.0,
    "word": 14.0,
    "chat": 8.0,
}
"""Problem categories with their weight in the training mixture (in examples, not tokens)."""

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One question; `messages` is the whole conversation up to and including it."""

    category: str
    messages: tuple[Message, ...]
    answer: str
    trace_high: str
    trace_low: str
    operation: str
    operands: tuple[int, ...]


def is_held_out(operation: str, operands: tuple[int, ...]) -> bool:
    """A stable twentieth of all operand sets; the order of operands is ignored, so a+b and b+a never part."""
    key = f"{operation}:{','.join(map(str, sorted(operands)))}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % 20 == 0


def is_right(problem: Problem, content: str) -> bool:
    """Whether the text after the reasoning is exactly the expected answer."""
    return content.strip() == problem.answer


def held_out(category: str, n: int, seed: int) -> list[Problem]:
    """`n` different single-turn problems whose operands never occur in training; chat has no operands to hold out."""
    rng = random.Random(f"held-out/{category}/{seed}")
    found: dict[object, Problem] = {}
    while len(found) < n:
        problem = draw(rng, category, held=True)
        key = (problem.operation, problem.operands) if problem.operands else problem.messages[0]["content"]
        found.setdefault(key, problem)
    return list(found.values())


def draw(rng: random.Random, category: str, held: bool = False) -> Problem:
    """One problem of `category` from the asked side of the split. Chat has no operands and no split."""
    while True:
        problem = MAKERS[category](rng)
        if category == "chat" or is_held_out(problem.operation, problem.operands) == held:
            return problem


def number(rng: random.Random, length: int) -> int:
    """A number of exactly `length` digits (zero counts as one digit)."""
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


def pair(rng: random.Random, longest: int) -> tuple[int, int]:
    """Two numbers, long ones more often; half of the time of the same length, sometimes nearly equal."""
    one = rng.choices(range(1, longest + 1), range(1, longest + 1))[0]
    two = one if rng.random() < 0.5 else rng.randint(1, longest)
    first, second = number(rng, one), number(rng, two)
    if rng.random() < 0.12:
        second = max(0, first + rng.choice((-1, 1)) * rng.choice((0, 1, 2, 10, 100, rng.randint(0, 99))))
        second = second if len(str(second)) <= longest else first
    return (first, second) if rng.random() < 0.5 else (second, first)


def build(category: str, question: str, worked: traces.Worked, operation: str, operands: tuple[int, ...]) -> Problem:
    message = {"role": "user", "content": question}
    return Problem(category, (message,), worked.answer, worked.high, worked.low, operation, operands)


def make_add(rng: random.Random) -> Problem:
    a, b = pair(rng, 5)
    return build("add", phrases.ask(rng, phrases.ADD, a=a, b=b), traces.add(a, b), "+", (a, b))


def make_subtract(rng: random.Random) -> Problem:
    a, b = pair(rng, 5)
    if a < b and rng.random() < 0.4:
        a, b = b, a
    return build("sub", phrases.ask(rng, phrases.SUBTRACT, a=a, b=b), traces.subtract(a, b), "-", (a, b))


def make_multiply(category: str, lengths: tuple[tuple[int, int], ...]) -> Callable[[random.Random], Problem]:
    """A maker for products of the given operand lengths."""

    def make(rng: random.Random) -> Problem:
        one, two = rng.choice(lengths)
        a, b = number(rng, one), number(rng, two)
        return build(category, phrases.ask(rng, phrases.MULTIPLY, a=a, b=b), traces.multiply(a, b), "*", (a, b))

    return make


def make_sum(rng: random.Random) -> Problem:
    longest = rng.choice((1, 2, 2, 3, 3))
    numbers = tuple(number(rng, rng.randint(1, longest)) for _ in range(rng.choice((3, 3, 4, 4, 5, 5))))
    return build("sum", phrases.list_numbers(rng, numbers), traces.total(numbers), "++", numbers)


def make_compare(rng: random.Random) -> Problem:
    a, b = pair(rng, 5)
    if rng.random() < 0.3:
        digits = list(str(a))
        rng.shuffle(digits)
        b = int("".join(digits))
    larger = rng.random() < 0.65
    question = phrases.ask(rng, phrases.LARGER if larger else phrases.SMALLER, a=a, b=b)
    return build("compare", question, traces.compare(a, b, larger), "?", (a, b))


def make_word(rng: random.Random) -> Problem:
    n, m, k = rng.sample(phrases.NAMES, 3)
    thing = rng.choice(phrases.THINGS)
    kind = rng.choices(("+", "-", "*", "?", "++"), (3, 3, 3, 3, 2))[0]
    values = {"n": n, "m": m, "k": k, "o": thing, "h": rng.choice(phrases.HOLDERS)}
    operands: tuple[int, ...]
    if kind == "*":
        operands = (number(rng, rng.randint(1, 2)), number(rng, rng.randint(1, 2)))
        wording, worked = rng.choice(phrases.WORD_MULTIPLY), traces.multiply(*operands)
    elif kind == "++":
        operands = tuple(number(rng, rng.randint(1, 3)) for _ in range(3))
        wording, worked = rng.choice(phrases.WORD_SUM), traces.total(operands)
    elif kind == "+":
        operands, wording = pair(rng, 3), rng.choice(phrases.WORD_ADD)
        worked = traces.add(*operands)
    elif kind == "-":
        operands, wording = tuple(sorted(pair(rng, 3), reverse=True)), rng.choice(phrases.WORD_SUBTRACT)
        worked = traces.subtract(*operands)
    else:
        operands = pair(rng, 3)
        wording, worked = rng.choice(phrases.WORD_COMPARE), traces.compare(*operands)
    question = wording.format(**values, **dict(zip("abc", operands, strict=False)))
    answer = worked.answer
    if answer.isdigit():  # of two equal numbers none is the larger, and the answer is a sentence
        answer += f" {thing[:-1] if answer == '1' else thing}"
    return build("word", question, replace(worked, answer=answer), kind, operands)


def too_long(rng: random.Random) -> str:
    """A question just beyond what the model was taught."""
    kind = rng.choice("+-*?s")
    if kind == "s":
        count, longest = rng.choice(((6, 3), (7, 2), (8, 2), (3, 5), (4, 4), (9, 1)))
        return phrases.list_numbers(rng, tuple(number(rng, longest) for _ in range(count)))
    limit = 3 if kind == "*" else 5
    lengths = [limit + rng.choice((1, 1, 2, 3, 4, 7)), rng.randint(1, limit + 3)]
    rng.shuffle(lengths)
    wordings = {"+": phrases.ADD, "-": phrases.SUBTRACT, "*": phrases.MULTIPLY, "?": phrases.LARGER}[kind]
    return phrases.ask(rng, wordings, a=number(rng, lengths[0]), b=number(rng, lengths[1]))


def make_chat(rng: random.Random) -> Problem:
    """Everything that is not arithmetic the model can do; the trace is the name of the situation."""
    kinds = ("greeting", "thanks", "goodbye", "who", "not arithmetic", "not clear", "division", "too long", "one step")
    kind = rng.choices((*kinds, "not whole"), (3, 1.5, 1, 2, 6, 4, 4, 6, 2.5, 2.5))[0]
    values: dict[str, object] = {
        "a": number(rng, rng.randint(1, 4)),
        "b": number(rng, rng.randint(1, 4)),
        "c": number(rng, 1),
    }
    values["o"] = rng.choice(phrases.THINGS)
    fixed = {"greeting": phrases.GREETINGS, "thanks": phrases.THANKS, "goodbye": phrases.GOODBYES, "who": phrases.WHO}
    if kind in fixed:
        question = rng.choice(fixed[kind])
        question = question.capitalize() if rng.random() < 0.5 else question
        question += rng.choice(("", "", "!", "?", "."))
    elif kind == "not arithmetic":
        question = phrases.general(rng)
    elif kind == "not clear":
        question = rng.choice((rng.choice(phrases.FOREIGN), rng.choice(phrases.FRAGMENTS), phrases.gibberish(rng)))
        question = question.format(**values) if question in phrases.FRAGMENTS else question
    elif kind == "too long":
        question = too_long(rng)
    else:
        wordings = {"division": phrases.DIVIDE, "one step": phrases.ONE_STEP, "not whole": phrases.NOT_WHOLE}[kind]
        question = phrases.ask(rng, wordings, **values)
    return build("chat", question, traces.Worked(kind, kind, phrases.REPLIES[kind]), "chat", ())


MAKERS = {
    "add": make_add,
    "sub": make_subtract,
    "mul": make_multiply("mul", ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (2, 2), (2, 2))),
    "mul3x2": make_multiply("mul3x2", ((3, 2), (3, 2), (2, 3))),
    "mul3x3": make_multiply("mul3x3", ((3, 3),)),
    "sum": make_sum,
    "compare": make_compare,
    "word": make_word,
    "chat": make_chat,
}
