"""The generator: traces are true, answers are right, and no held-out operands reach training."""

import random
import re

import pytest

from benchmarks.tiny import phrases, problems, traces

ARITHMETIC = [name for name in problems.CATEGORIES if name != "chat"]
TRUE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def many(count: int = 300, held: bool = False):
    rng = random.Random(7)
    return [problems.draw(rng, name, held) for name in ARITHMETIC for _ in range(count)]


def value(problem: problems.Problem) -> int:
    a, *rest = problem.operands
    return sum(problem.operands) if problem.operation == "++" else TRUE[problem.operation](a, rest[0])


def test_answers_are_true():
    for problem in many():
        if problem.operation != "?":
            assert int(problem.answer.split()[0]) == value(problem), problem


def test_comparisons_are_true():
    for first, second in ((523, 532), (7, 1200), (99999, 9999), (0, 1)):
        assert traces.compare(first, second).answer == str(max(first, second))
        assert traces.compare(first, second, want_larger=False).answer == str(min(first, second))
    assert traces.compare(41, 41).answer == "They are equal."


def test_final_line_spells_the_answer():
    for problem in many():
        sign, tagged = re.fullmatch(r"[=<>](-?)((?:[a-f]\d)*)", problem.trace_high.rsplit("\n", 1)[1]).groups()
        if problem.operation != "?":
            assert int(sign + re.sub("[a-f]", "", tagged)) == value(problem)


def test_every_step_of_a_trace_is_true():
    for problem in many():
        for one, two, three, result in re.findall(r"[a-e](\d)\+(\d)\+(\d)=(\d\d)", problem.trace_high):
            assert int(one) + int(two) + int(three) == int(result)
        for one, two, product, running, carry, result in re.findall(
            r"(\d)\*(\d)=(\d\d)\+(\d)\+(\d)=(\d\d)", problem.trace_high
        ):
            assert int(one) * int(two) == int(product)
            assert int(product) + int(running) + int(carry) == int(result)


@pytest.mark.parametrize(("first", "second", "answer"), [(18, 905, "-887"), (905, 18, "887"), (44, 44, "0")])
def test_subtraction_signs(first, second, answer):
    assert traces.subtract(first, second).answer == answer


def test_the_format_of_traces():
    assert traces.add(47382, 905).high == (
        "47382+905\ne4d7c3b8a2+E0D0C9B0A5\na2+5+0=07;b8+0+0=08;c3+9+0=12;d7+0+1=08;e4+0+0=04;\n=e4d8c2b8a7"
    )
    assert traces.multiply(12, 34).low == "b1a2*B3A4\nA4:08,04,0\nB3:10,04,0"
    assert traces.total((9, 9, 9)).high == "9+9+9\na9+A9+p9\na9+A9=18+p9=27+0=27;b2;\n=b2a7"


def test_low_effort_is_shorter():
    ratios = sorted(len(problem.trace_low) / len(problem.trace_high) for problem in many(100))
    assert ratios[len(ratios) // 2] < 0.5
    assert ratios[-1] < 0.8


def test_split_never_leaks():
    for problem in many(100):
        assert not problems.is_held_out(problem.operation, problem.operands)
    for name in ARITHMETIC:
        for problem in problems.held_out(name, 30, seed=3):
            assert problems.is_held_out(problem.operation, problem.operands)


def test_split_ignores_operand_order_and_is_stable():
    assert problems.is_held_out("+", (12, 34)) == problems.is_held_out("+", (34, 12))
    held = [pair for pair in ((a, b) for a in range(20) for b in range(a, 20)) if problems.is_held_out("*", pair)]
    assert held[:1] == [(0, 10)]
    assert 5 <= len(held) <= 16


def test_held_out_is_reproducible():
    assert problems.held_out("word", 5, seed=1) == problems.held_out("word", 5, seed=1)
    assert problems.held_out("word", 5, seed=1) != problems.held_out("word", 5, seed=2)


def test_is_right_wants_the_exact_answer():
    problem = problems.held_out("add", 1, seed=0)[0]
    assert problems.is_right(problem, f"\n{problem.answer}")
    assert not problems.is_right(problem, problem.answer + "0")


def test_chat_replies_are_the_fixed_ones():
    for problem in problems.held_out("chat", 200, seed=0):
        assert problem.answer == phrases.REPLIES[problem.trace_high]
