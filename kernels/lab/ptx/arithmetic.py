"""Arithmetic, comparison and selection. Approximate instructions (ex2, rcp, div.full) are rounded correctly here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.kernels.lab.ptx.machine import Machine, Step, instruction
from headrace.kernels.lab.ptx.parse import WIDTHS, Instruction, Negated, Pair, PtxError
from headrace.kernels.lab.ptx.values import FLOATS, PACKED, SIGNED, UNSIGNED, Array, Mask, decode, encode, flush, fused
from headrace.kernels.lab.ptx.values import is_float as float_kind

Function = Callable[..., Array]


def lanewise(mask: Mask, packed: bool) -> Mask:
    return mask[:, None] if packed and not isinstance(mask, bool) else mask


def compute(machine: Machine, each: Instruction, function: Function, count: int, kind: str = "") -> Step:
    """d = function(operands) of one type, with the modifiers ftz and sat, on packed types element by element."""
    kind = kind or each.parts[-1]
    base, packed = PACKED.get(kind, kind), kind in PACKED
    sources = [machine.view(operand, kind) for operand in each.operands[1 : 1 + count]]
    target = machine.view(each.operands[0], kind)
    flushes, saturates = "ftz" in each.parts and base == "f32", "sat" in each.parts
    if saturates and not float_kind(kind):
        raise PtxError("saturating integer arithmetic")
    if isinstance(function, np.ufunc) and not (base == "bf16" or flushes or saturates):
        return lambda mask: function(*sources, out=target, where=lanewise(mask, packed))

    def step(mask: Mask) -> None:
        values = [decode(source, base) for source in sources]
        result = function(*(flush(value) for value in values)) if flushes else function(*values)
        result = flush(result) if flushes else result
        if saturates:
            result = np.nan_to_num(np.clip(result, 0, 1), nan=0.0)
        if float_kind(kind) and result.dtype != target.dtype:
            result = encode(result, base)
        np.copyto(target, result, where=lanewise(mask, packed), casting="unsafe")

    return step


def _in_double(function: Function) -> Function:
    """``function`` evaluated in fp64, then rounded to the type of its argument."""
    return lambda value: function(value.astype(np.float64)).astype(value.dtype)


def _reciprocal_root(value: Array) -> Array:
    root: Array = 1 / np.sqrt(value)
    return root


UNARY: dict[str, Function] = {
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _in_double(np.tanh),
    "rsqrt": _in_double(_reciprocal_root),
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "neg": np.negative,
}


@instruction(*UNARY)
def unary(machine: Machine, each: Instruction) -> Step:
    return compute(machine, each, UNARY[each.parts[0]], 1)


@instruction("add", "sub")
def add(machine: Machine, each: Instruction) -> Step:
    _nearest_only(each)
    return compute(machine, each, np.add if each.parts[0] == "add" else np.subtract, 2)


@instruction("mul")
def multiply(machine: Machine, each: Instruction) -> Step:
    kind = each.parts[-1]
    if float_kind(kind):
        _nearest_only(each)
        return compute(machine, each, np.multiply, 2)
    if "wide" in each.parts:
        return _wide(machine, each)
    return compute(machine, each, _high if "hi" in each.parts else np.multiply, 2)


@instruction("mad")
def multiply_add(machine: Machine, each: Instruction) -> Step:
    kind = each.parts[-1]
    if float_kind(kind):
        return multiply_fused(machine, each)
    if "wide" in each.parts:
        return _wide(machine, each)
    product = _high if "hi" in each.parts else np.multiply
    return compute(machine, each, lambda a, b, c: product(a, b) + c, 3)


def _wide(machine: Machine, each: Instruction) -> Step:
    """mul.wide and mad.wide: the product, and the addend, are twice as wide as the factors."""
    kind = each.parts[-1]
    double = f"{kind[0]}{2 * WIDTHS[kind]}"
    a, b = machine.view(each.operands[1], kind), machine.view(each.operands[2], kind)
    addend = machine.view(each.operands[3], double) if len(each.operands) > 3 else None
    target = machine.view(each.operands[0], double)

    def step(mask: Mask) -> None:
        product = a.astype(target.dtype) * b
        np.copyto(target, product if addend is None else product + addend, where=mask)

    return step


def _high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = SIGNED[64] if a.dtype.kind == "i" else UNSIGNED[64]
        product: Array = (a.astype(wide) * b.astype(wide)) >> wide(bits)
        return product.astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high: Array = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


@instruction("fma")
def multiply_fused(machine: Machine, each: Instruction) -> Step:
    _nearest_only(each)
    base = PACKED.get(each.parts[-1], each.parts[-1])
    relu = "relu" in each.parts

    def function(a: Array, b: Array, c: Array) -> Array:
        result = fused(a, b, c, base)
        return np.where(decode(result, base) > 0, result, result.dtype.type(0)) if relu else result

    return compute(machine, each, function, 3)


@instruction("div")
def divide(machine: Machine, each: Instruction) -> Step:
    if float_kind(each.parts[-1]):
        return compute(machine, each, np.divide, 2)
    return compute(machine, each, lambda a, b: ((a - _remainder(a, b)) // _nonzero(b)).astype(a.dtype), 2)


@instruction("rem")
def remainder(machine: Machine, each: Instruction) -> Step:
    return compute(machine, each, _remainder, 2)


def _remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, _nonzero(b))


def _nonzero(divisor: Array) -> Array:
    return np.where(divisor == 0, divisor.dtype.type(1), divisor)


@instruction("min", "max")
def extreme(machine: Machine, each: Instruction) -> Step:
    """NaN loses unless ``.NaN``; sm_100 takes three operands."""
    if "xorsign" in each.parts:
        raise PtxError("xorsign")
    propagates = "NaN" in each.parts or not float_kind(each.parts[-1])
    least = each.parts[0] == "min"
    function: Function
    if propagates:
        function = np.minimum if least else np.maximum
    else:
        function = np.fmin if least else np.fmax
    absolute = "abs" in each.parts
    count = len(each.operands) - 1
    if count == 2 and not absolute:
        return compute(machine, each, function, 2)

    def reduce(*values: Array) -> Array:
        result = np.abs(values[0]) if absolute else values[0]
        for value in values[1:]:
            result = function(result, np.abs(value) if absolute else value)
        return result

    return compute(machine, each, reduce, count)


@instruction("copysign")
def copy_sign(machine: Machine, each: Instruction) -> Step:
    return compute(machine, each, lambda a, b: np.copysign(b, a), 2)


@instruction("testp")
def test_property(machine: Machine, each: Instruction) -> Step:
    kind, tiny = each.parts[-1], np.finfo(FLOATS[each.parts[-1]]).tiny
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda v: ~np.isnan(v),
        "notanumber": np.isnan,
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= tiny),
        "subnormal": lambda v: (v != 0) & (np.abs(v) < tiny),
    }
    test, source, write = tests[each.parts[1]], machine.view(each.operands[1], kind), _predicate(machine, each)
    return lambda mask: write(test(source), mask)


def _predicate(machine: Machine, each: Instruction) -> Callable[[Array, Mask], None]:
    return machine.sink(each.operands[0], "pred")


ORDERED: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(name: str, floating: bool) -> Function:
    """A float comparison is false on NaN; with ``u`` behind its name it is true."""
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if not floating:
        return ORDERED[name]
    if name in ORDERED:
        if name != "ne":
            return ORDERED[name]  # numpy's are false on NaN as well
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    base = ORDERED[name.removesuffix("u")]
    return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)


@instruction("setp")
def set_predicate(machine: Machine, each: Instruction) -> Step:
    kind = each.parts[-1]
    if kind in PACKED:
        raise PtxError("packed comparison")
    compare = _comparison(each.parts[1], float_kind(kind))
    a, b = machine.view(each.operands[1], kind), machine.view(each.operands[2], kind)
    first = each.operands[0]
    results = [first.first, first.second] if isinstance(first, Pair) else [first]
    write = [machine.sink(operand, "pred") for operand in results]
    joins: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = joins.get(each.parts[2]) if len(each.operands) > 3 else None
    inverted, third = False, None
    if join is not None:
        operand = each.operands[3]
        inverted = isinstance(operand, Negated)
        third = machine.view(operand.predicate if isinstance(operand, Negated) else operand, "pred")
    flushes = "ftz" in each.parts

    def step(mask: Mask) -> None:
        x, y = decode(a, kind), decode(b, kind)
        result = compare(flush(x), flush(y)) if flushes else compare(x, y)
        for index, sink in enumerate(write):
            value = ~result if index else result
            if join is not None and third is not None:
                value = join(value, ~third if inverted else third)
            sink(value, mask)

    return step


@instruction("selp")
def select(machine: Machine, each: Instruction) -> Step:
    bits = f"b{WIDTHS[each.parts[-1]]}"
    a, b, target = (machine.view(each.operands[i], bits) for i in (1, 2, 0))
    predicate = machine.view(each.operands[3], "pred")
    return lambda mask: np.copyto(target, np.where(predicate, a, b), where=mask)


@instruction("slct")
def select_by_sign(machine: Machine, each: Instruction) -> Step:
    bits, kind = f"b{WIDTHS[each.parts[-2]]}", each.parts[-1]
    a, b, target = (machine.view(each.operands[i], bits) for i in (1, 2, 0))
    sign = machine.view(each.operands[3], kind)
    return lambda mask: np.copyto(target, np.where(sign >= 0, a, b), where=mask)


def _nearest_only(each: Instruction) -> None:
    if {"rz", "rm", "rp"} & set(each.parts):
        raise PtxError("a rounding other than to nearest")
