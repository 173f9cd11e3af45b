"""Worked arithmetic in text: the reasoning a tiny model is trained to write.

The model has no positional encoding, so each step is a fact about a few neighbouring characters, and every digit that
has to be found again carries a place tag (a = units, b = tens, ...). Each operand has its own letters, which turns
"the tens digit of the second number" into a lookup of one symbol.
"""

from dataclasses import dataclass

TAGS = ("abcdef", "ABCDEF", "pqr", "PQR", "xyz")
"""Place letters, units first, of the first to the fifth operand. Results use the first operand's letters."""


@dataclass(frozen=True)
class Worked:
    """One calculation: the full trace, the short trace and the final answer."""

    high: str
    low: str
    answer: str


def digits(number: int, width: int) -> list[int]:
    """Digits of `number`, units first, zero-padded to `width`."""
    return [number // 10**place % 10 for place in range(width)]


def tagged(number: int, width: int, tags: str = TAGS[0]) -> str:
    """`tagged(47, 3)` is `c0b4a7`."""
    return "".join(f"{tags[place]}{digit}" for place, digit in reversed(list(enumerate(digits(number, width)))))


def add(first: int, second: int) -> Worked:
    """Column addition from the units up; every column states first digit + second digit + carry."""
    width = max(len(str(first)), len(str(second)))
    head = f"{tagged(first, width)}+{tagged(second, width, TAGS[1])}"
    carry, steps, totals = 0, [], []
    for tag, one, two in zip(TAGS[0], digits(first, width), digits(second, width), strict=False):
        total = one + two + carry
        steps.append(f"{tag}{one}+{two}+{carry}={total:02d};")
        totals.append(f"{total:02d}")
        carry = total // 10
    if carry:
        steps.append(f"{TAGS[0][width]}{carry};")
    result = first + second
    high = f"{first}+{second}\n{head}\n{''.join(steps)}\n={tagged(result, width + carry)}"
    return Worked(high, f"{head}\n{','.join(totals)}", str(result))


def total(numbers: tuple[int, ...]) -> Worked:
    """Sum of three to five numbers: each column keeps a running total over the operands, then adds the carry."""
    width = max(len(str(number)) for number in numbers)
    head = "+".join(tagged(number, width, tags) for number, tags in zip(numbers, TAGS, strict=False))
    carry, steps, totals = 0, [], []
    for place in range(width):
        column = [number // 10**place % 10 for number in numbers]
        running, step = column[0], f"{TAGS[0][place]}{column[0]}"
        for tags, digit in zip(TAGS[1:], column[1:], strict=False):
            running += digit
            step += f"+{tags[place]}{digit}={running:02d}"
        running += carry
        steps.append(f"{step}+{carry}={running:02d};")
        totals.append(f"{running:02d}")
        carry = running // 10
    if carry:
        steps.append(f"{TAGS[0][width]}{carry};")
    result = sum(numbers)
    high = f"{'+'.join(map(str, numbers))}\n{head}\n{''.join(steps)}\n={tagged(result, width + bool(carry))}"
    return Worked(high, f"{head}\n{','.join(totals)}", str(result))


def order(first: int, second: int, width: int) -> tuple[str, str]:
    """Digit by digit comparison from the top down to the first difference, and the sign found there."""
    steps = []
    pairs = zip(TAGS[0], digits(first, width), digits(second, width), strict=False)
    for tag, one, two in reversed(list(pairs)):
        sign = "=" if one == two else "<" if one < two else ">"
        steps.append(f"{tag}{one}{sign}{two};")
        if sign != "=":
            return "".join(steps), sign
    return "".join(steps), "="


def subtract(first: int, second: int) -> Worked:
    """Compare, then subtract the smaller from the larger; capital tags mean the larger one was the second operand."""
    width = max(len(str(first)), len(str(second)))
    head = f"{tagged(first, width)}-{tagged(second, width, TAGS[1])}"
    compared, sign = order(first, second, width)
    start = f"{first}-{second}\n{head}\n{compared}\n"
    if sign == "=":
        return Worked(f"{start}=a0", f"{head}\n=", "0")
    large, small, tags = (first, second, TAGS[0]) if sign == ">" else (second, first, TAGS[1])
    borrow, steps, short = 0, [], []
    for tag, one, two in zip(tags, digits(large, width), digits(small, width), strict=False):
        digit, next_borrow = (one - two - borrow) % 10, int(one - two - borrow < 0)
        steps.append(f"{tag}{one}-{two}-{borrow}={digit},{next_borrow};")
        short.append(f"{digit}{next_borrow}")
        borrow = next_borrow
    minus = "-" if sign == "<" else ""
    high = f"{start}{''.join(steps)}\n={minus}{tagged(large - small, width)}"
    return Worked(high, f"{head}\n{sign}{','.join(short)}", str(first - second))


def multiply(first: int, second: int) -> Worked:
    """Row by row: digit product + running total at that place + carry, so a row's results replace the total."""
    tops, bottoms = digits(first, len(str(first))), digits(second, len(str(second)))
    head = f"{tagged(first, len(tops))}*{tagged(second, len(bottoms), TAGS[1])}"
    running = [0] * (len(tops) + len(bottoms))
    high_rows, low_rows = [], []
    for shift, factor in enumerate(bottoms):
        carry, steps, short = 0, [], []
        for place, digit in enumerate(tops):
            at, product = place + shift, digit * factor
            value = product + running[at] + carry
            steps.append(
                f"{TAGS[0][at]}:{TAGS[0][place]}{digit}*{factor}={product:02d}+{running[at]}+{carry}={value:02d};"
            )
            short.append(f"{value:02d}")
            carry, running[at] = divmod(value, 10)
        running[shift + len(tops)] = carry
        row = f"{TAGS[1][shift]}{factor}:"
        high_rows.append(f"{row}{''.join(steps)}{TAGS[0][shift + len(tops)]}:{carry};")
        low_rows.append(f"{row}{','.join(short)},{carry}")
    final = f"={tagged(first * second, len(running))}"
    high = "\n".join([f"{first}*{second}", head, *high_rows, final])
    return Worked(high, "\n".join([head, *low_rows]), str(first * second))


def compare(first: int, second: int, want_larger: bool = True) -> Worked:
    """The larger (or smaller) of two numbers."""
    width = max(len(str(first)), len(str(second)))
    head = f"{tagged(first, width)}?{tagged(second, width, TAGS[1])}"
    compared, sign = order(first, second, width)
    start = f"{'max' if want_larger else 'min'}:{first}?{second}\n{head}\n{compared}\n"
    if sign == "=":
        return Worked(f"{start}=", f"{head}\n=", "They are equal.")
    picked = max(first, second) if want_larger else min(first, second)
    return Worked(f"{start}{sign}{tagged(picked, width)}", f"{head}\n{sign}", str(picked))
