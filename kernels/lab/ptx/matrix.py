"""ldmatrix, stmatrix and mma.sync, all warps of a CTA at once.

Fragments follow the PTX manual (warp-level matrix instructions): in every fragment a lane is (group = lane / 4,
position = lane % 4). The products of one mma are summed exactly (in fp64) with the accumulator and rounded once; tensor
cores keep fewer bits and an order of their own, so results agree within the tolerance of one fp32 rounding a step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from headrace.kernels.lab.ptx.access import locator
from headrace.kernels.lab.ptx.device_memory import registers
from headrace.kernels.lab.ptx.machine import WARP, Machine, Step, instruction
from headrace.kernels.lab.ptx.parse import Instruction, PtxError
from headrace.kernels.lab.ptx.values import FP8_VALUES, Array, Mask, from_bf16

LANE = np.arange(WARP)
ROW = 16  # bytes of a row of an 8x8 matrix of 16-bit elements


@instruction("ldmatrix")
def load_matrix(machine: Machine, each: Instruction) -> Step:
    """Lane 8 j + r holds the address of row r of matrix j; lane t receives elements 2 (t % 4), + 1 of row t / 4."""
    items = machine.components(each.operands[0])
    _only_b16(each)
    locate = locator(machine, each.operands[1], _bits(machine, each, 1))
    writes = [machine.sink(item, "b32") for item in items]
    transposed = "trans" in each.parts
    rows = 8 * len(items)

    def step(mask: Mask) -> None:
        lanes, addresses = locate(mask)
        warps = _whole_warps(each, lanes)
        given = addresses.reshape(-1, WARP)[:, :rows].reshape(-1)
        owners = np.repeat(warps, rows)
        halves = machine.shared.load(each, given, owners, ROW, 16).reshape(len(warps), len(items), 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(len(warps), len(items), WARP)
        for index, write in enumerate(writes):
            _scatter(machine, write, warps, words[:, index], mask)

    return step


@instruction("stmatrix")
def store_matrix(machine: Machine, each: Instruction) -> Step:
    _only_b16(each)
    items = machine.components(each.operands[1])
    locate = locator(machine, each.operands[0], _bits(machine, each, 0))
    views = [machine.view(item, "b32") for item in items]
    transposed = "trans" in each.parts
    rows = 8 * len(items)

    def step(mask: Mask) -> None:
        lanes, addresses = locate(mask)
        warps = _whole_warps(each, lanes)
        given = addresses.reshape(-1, WARP)[:, :rows].reshape(-1)
        words = np.stack(views).reshape(len(items), machine.warps, WARP)[:, warps].swapaxes(0, 1)
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), len(items), 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        values = np.ascontiguousarray(halves).reshape(-1, 8)
        machine.shared.store(each, given, np.repeat(warps, rows), values, 16)

    return step


def _only_b16(each: Instruction) -> None:
    if each.parts[-1] != "b16" or "m8n8" not in each.parts:
        raise PtxError("matrices other than 8x8 of 16 bits")


def _bits(machine: Machine, each: Instruction, operand: int) -> int:
    names = registers(each.operands[operand])
    return machine.program.registers[names[0]] if names else 32


def _whole_warps(each: Instruction, lanes: Array) -> Array:
    """Numbers of the warps of ``lanes``. Raises PtxError if a warp takes part with some of its lanes only."""
    warps, counts = np.unique(lanes // WARP, return_counts=True)
    if (counts != WARP).any():
        raise PtxError(f"some lanes of a warp are missing: {each.where}")
    return warps


def _scatter(machine: Machine, write: Callable[[Array, Mask], None], warps: Array, values: Array, mask: Mask) -> None:
    """Write [chosen warps, 32] into a register."""
    if mask is True:
        write(values.reshape(-1), True)
        return
    full = np.zeros((machine.warps, WARP), values.dtype)
    full[warps] = values
    write(full.reshape(-1), mask)


@dataclass(frozen=True)
class Element:
    """How a 32-bit register of a fragment holds numbers."""

    count: int  # in one register
    numbers: Callable[[Array], Array]  # uint32 [...] -> [..., count]


def _parts(words: Array, kind: str) -> Array:
    return words.view(kind).reshape(*words.shape, -1)


ELEMENTS = {
    "bf16": Element(2, lambda words: from_bf16(_parts(words, "u2")).astype(np.float64)),
    "f16": Element(2, lambda words: _parts(words, "f2").astype(np.float64)),
    "tf32": Element(1, lambda words: (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]),
    "e4m3": Element(4, lambda words: FP8_VALUES["e4m3"][_parts(words, "u1")].astype(np.float64)),
    "e5m2": Element(4, lambda words: FP8_VALUES["e5m2"][_parts(words, "u1")].astype(np.float64)),
    "s8": Element(4, lambda words: _parts(words, "i1").astype(np.int64)),
    "u8": Element(4, lambda words: _parts(words, "u1").astype(np.int64)),
}


@instruction("mma")
def multiply_matrices(machine: Machine, each: Instruction) -> Step:
    """D[16, 8] = A[16, K] B[K, 8] + C per warp: mma.sync.aligned.m16n8kK.row.col."""
    shape = re.search(r"\.m16n8k(\d+)\.row\.col\.", each.opcode)
    if shape is None or {"kind::mxf4nvf4", "kind::mxf8f6f4", "kind::mxf4", "sp"} & set(each.parts):
        raise PtxError("this matrix instruction")
    depth = int(shape[1])
    accumulator, left, right = each.parts[-1], ELEMENTS.get(each.parts[-3]), ELEMENTS.get(each.parts[-2])
    if left is None or right is None or accumulator not in ("f32", "s32"):
        raise PtxError("these operand types")
    d, a, b, c = (machine.components(operand) for operand in each.operands[:4])
    if len(a) != depth // (2 * left.count) or len(b) != depth // (4 * right.count):
        raise PtxError(f"{len(a)} and {len(b)} registers of fragments")
    views_a, views_b = ([machine.view(item, "b32") for item in items] for items in (a, b))
    views_c = [machine.view(item, accumulator) for item in c]
    writes = [machine.sink(item, accumulator) for item in d]

    def step(mask: Mask) -> None:
        if mask is not True:
            _whole_warps(each, np.flatnonzero(mask))
        total = _left(views_a, left, depth) @ _right(views_b, right, depth)
        # An accumulator's register i is row group + 8 (i / 2), column 2 position + i % 2.
        sums = np.stack(views_c).reshape(2, 2, -1, 8, 4)  # half, odd, warp, group, position
        both = total.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3) + sums
        result = both.astype(sums.dtype).reshape(4, -1)
        for write, values in zip(writes, result, strict=True):
            write(values, mask)

    return step


def _left(views: list[Array], element: Element, depth: int) -> Array:
    """A as [warps, 16, K]: register i is row group + 8 (i % 2), columns of half i / 2."""
    words = np.stack(views).reshape(-1, 2, views[0].size // WARP, 8, 4)  # column half, row half, warp, group, position
    numbers = element.numbers(words)
    return numbers.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, depth)


def _right(views: list[Array], element: Element, depth: int) -> Array:
    """B as [warps, K, 8]: register i is rows of part i, column group."""
    words = np.stack(views).reshape(-1, views[0].size // WARP, 8, 4)  # part, warp, group, position
    numbers = element.numbers(words)
    return numbers.transpose(1, 0, 3, 4, 2).reshape(-1, depth, 8)
