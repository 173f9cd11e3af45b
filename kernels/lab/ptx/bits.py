"""Moves, logic, shifts and permutations of bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.kernels.lab.ptx.arithmetic import compute
from headrace.kernels.lab.ptx.machine import Machine, Step, instruction
from headrace.kernels.lab.ptx.parse import WIDTHS, Immediate, Instruction, PtxError, Vector
from headrace.kernels.lab.ptx.values import UNSIGNED, Array, Mask


@instruction("mov", "cvta")
def move(machine: Machine, each: Instruction) -> Step:
    target, source = each.operands
    kind = each.parts[-1]
    if kind == "pred":
        value, write = machine.view(source, "pred"), machine.sink(target, "pred")
        return lambda mask: write(value, mask)
    bits = WIDTHS[kind]
    if isinstance(target, Vector):
        return _unpack(machine, target, machine.view(source, f"b{bits}"), bits)
    if isinstance(source, Vector):
        return _pack(machine, source, machine.view(target, f"b{bits}"), bits)
    row, whole = machine.view(target, f"b{bits}"), machine.view(source, f"b{bits}")
    return lambda mask: np.copyto(row, whole, where=mask)


def _unpack(machine: Machine, target: Vector, source: Array, bits: int) -> Step:
    each = bits // len(target.items)
    parts = source.view(UNSIGNED[each]).reshape(machine.threads, len(target.items))
    writes = [machine.sink(item, f"b{each}") for item in target.items]

    def step(mask: Mask) -> None:
        for index, write in enumerate(writes):
            write(parts[:, index], mask)

    return step


def _pack(machine: Machine, source: Vector, target: Array, bits: int) -> Step:
    each = bits // len(source.items)
    parts = [machine.view(item, f"b{each}") for item in source.items]

    def step(mask: Mask) -> None:
        packed = np.stack(parts, 1).view(target.dtype)[:, 0]
        np.copyto(target, packed, where=mask)

    return step


LOGIC: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(*LOGIC)
def logic(machine: Machine, each: Instruction) -> Step:
    return compute(machine, each, LOGIC[each.parts[0]], 2)


@instruction("not")
def invert(machine: Machine, each: Instruction) -> Step:
    return compute(machine, each, np.invert, 1)


@instruction("cnot")
def is_zero(machine: Machine, each: Instruction) -> Step:
    return compute(machine, each, lambda value: (value == 0).astype(value.dtype), 1)


@instruction("shl", "shr")
def shift(machine: Machine, each: Instruction) -> Step:
    """Amounts are clamped: a shift by the width or more leaves nothing, or the sign."""
    kind = each.parts[-1]
    bits = WIDTHS[kind]
    left = each.parts[0] == "shl"
    function = np.left_shift if left else np.right_shift
    source, target = machine.view(each.operands[1], kind), machine.view(each.operands[0], kind)
    amount = machine.view(each.operands[2], "u32")
    if isinstance(each.operands[2], Immediate) and amount[0] < bits:
        constant = amount.astype(source.dtype)
        return lambda mask: function(source, constant, out=target, where=mask)

    def step(mask: Mask) -> None:
        shifted = function(source, np.minimum(amount, bits - 1).astype(source.dtype))
        if left or kind[0] != "s":
            shifted = np.where(amount >= bits, source.dtype.type(0), shifted)
        np.copyto(target, shifted, where=mask)

    return step


@instruction("shf")
def funnel_shift(machine: Machine, each: Instruction) -> Step:
    """shf.l / shf.r: 32 bits of the 64 in (high b, low a)."""
    low, high, amount = (machine.view(operand, "u32") for operand in each.operands[1:4])
    target = machine.view(each.operands[0], "u32")
    left, wraps = each.parts[1] == "l", "wrap" in each.parts

    def step(mask: Mask) -> None:
        by = (amount & np.uint32(31) if wraps else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        shifted = (both << by) >> np.uint64(32) if left else both >> by
        np.copyto(target, shifted.astype(np.uint32), where=mask)

    return step


@instruction("bfe")
def extract(machine: Machine, each: Instruction) -> Step:
    kind = each.parts[-1]
    bits = WIDTHS[kind]
    source, target = machine.view(each.operands[1], f"u{bits}"), machine.view(each.operands[0], f"u{bits}")
    start, length = (machine.view(operand, "u32") for operand in each.operands[2:4])

    def step(mask: Mask) -> None:
        first = np.minimum(start & np.uint32(255), bits).astype(np.int64)
        count = np.minimum(length & np.uint32(255), bits).astype(np.int64)
        wide = source.astype(np.uint64)
        found = np.where(first >= bits, np.uint64(0), wide >> np.minimum(first, bits - 1).astype(np.uint64))
        found &= _ones(count)
        if kind[0] == "s":
            top = np.minimum(first + count - 1, bits - 1)
            negative = (wide >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1) & (count > 0)
            found = np.where(negative == 1, found | ~_ones(np.minimum(count, bits - first)), found)
        np.copyto(target, found.astype(target.dtype), where=mask)

    return step


@instruction("bfi")
def insert(machine: Machine, each: Instruction) -> Step:
    bits = WIDTHS[each.parts[-1]]
    field, base, target = (machine.view(each.operands[i], f"u{bits}") for i in (1, 2, 0))
    start, length = (machine.view(operand, "u32") for operand in each.operands[3:5])

    def step(mask: Mask) -> None:
        first = np.minimum(start & np.uint32(255), bits).astype(np.int64)
        count = np.clip(length & np.uint32(255), 0, bits - first)
        shift_by = np.minimum(first, 63).astype(np.uint64)
        window = np.where(first >= bits, np.uint64(0), _ones(count) << shift_by)
        merged = (base & ~window) | ((field.astype(np.uint64) << shift_by) & window)
        np.copyto(target, merged.astype(target.dtype), where=mask)

    return step


def _ones(count: Array) -> Array:
    """The lowest ``count`` (0..64) bits set."""
    count = np.maximum(count, 0)
    short = (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(count >= 64, ~np.uint64(0), short)


@instruction("prmt")
def permute_bytes(machine: Machine, each: Instruction) -> Step:
    if each.parts[-1] != "b32" or len(each.parts) > 2:
        raise PtxError("a special mode of prmt")
    a, b, selector = (machine.view(operand, "u32") for operand in each.operands[1:4])
    target = machine.view(each.operands[0], "u32")
    nibbles = np.arange(0, 16, 4, dtype=np.uint32)

    def step(mask: Mask) -> None:
        content = np.stack((a, b), 1).view(np.uint8)
        chosen = (selector[:, None] >> nibbles) & np.uint32(15)
        found = np.take_along_axis(content, (chosen & 7).astype(np.intp), 1)
        signs = np.where(found & 128, np.uint8(255), np.uint8(0))
        result = np.where(chosen & 8, signs, found)
        np.copyto(target, np.ascontiguousarray(result).view(np.uint32)[:, 0], where=mask)

    return step


@instruction("lop3")
def logic_table(machine: Machine, each: Instruction) -> Step:
    table = each.operands[4]
    if not isinstance(table, Immediate):
        raise PtxError("a look-up table that is not constant")
    minterms = [index for index in range(8) if table.bits >> index & 1]

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for index in minterms:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        return result

    return compute(machine, each, function, 3, "b32")


@instruction("popc", "clz", "brev", "bfind")
def scan_bits(machine: Machine, each: Instruction) -> Step:
    name, kind = each.parts[0], each.parts[-1]
    bits = WIDTHS[kind]
    source = machine.view(each.operands[1], kind)
    write = machine.sink(each.operands[0], f"u{bits}" if name == "brev" else "u32")
    shift_amount = "shiftamt" in each.parts

    def step(mask: Mask) -> None:
        value = source
        if name == "bfind" and kind[0] == "s":
            value = np.where(value < 0, ~value, value)
        digits = np.unpackbits(np.ascontiguousarray(value).view(np.uint8).reshape(-1, bits // 8), 1, bitorder="little")
        if name == "brev":
            write(np.packbits(digits[:, ::-1], axis=1, bitorder="little").view(UNSIGNED[bits])[:, 0], mask)
            return
        top = np.where(digits.any(1), bits - 1 - digits[:, ::-1].argmax(1), -1)
        if name == "popc":
            found = digits.sum(1)
        elif name == "clz" or (shift_amount and name == "bfind"):
            found = np.where((top < 0) & (name == "bfind"), -1, bits - 1 - top)
        else:
            found = top
        write(found.astype(np.int32).view(np.uint32), mask)

    return step
