"""cvt: between integers, floats, and the packed small formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.kernels.lab.ptx.machine import Machine, Step, instruction
from headrace.kernels.lab.ptx.parse import WIDTHS, Instruction, PtxError
from headrace.kernels.lab.ptx.values import (
    E2M1_VALUES,
    FLOATS,
    FP8_VALUES,
    Array,
    Mask,
    decode,
    dtype,
    encode,
    flush,
    is_float,
    to_bf16,
    to_e2m1,
    to_fp8,
)

TO_INTEGRAL: dict[str, Callable[[Array], Array]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}
SMALL = ("e4m3x2", "e5m2x2", "e2m1x2")
HALVES = ("f16x2", "bf16x2")


@instruction("cvt")
def convert(machine: Machine, each: Instruction) -> Step:
    if each.parts[1] == "pack" or "rs" in each.parts:
        raise PtxError("this form of cvt")
    target, source = each.parts[-2:]
    if source in SMALL:
        return _from_small(machine, each, target, source)
    if target in SMALL:
        return _to_small(machine, each, target, source)
    if target in HALVES:
        return _to_halves(machine, each, target, source)
    return _scalar(machine, each, target, source)


def _scalar(machine: Machine, each: Instruction, target: str, source: str) -> Step:
    view, write = machine.view(each.operands[1], source), machine.sink(each.operands[0], target)
    integral = next((TO_INTEGRAL[part] for part in each.parts if part in TO_INTEGRAL), None)
    if is_float(target) and {"rz", "rm", "rp"} & set(each.parts) and not _exact(target, source):
        raise PtxError("a rounding other than to nearest")
    relu, saturates, flushes = "relu" in each.parts, "sat" in each.parts, "ftz" in each.parts

    def step(mask: Mask) -> None:
        value = decode(view, source)
        if flushes and value.dtype == np.float32:
            value = flush(value)
        if integral is not None:
            value = integral(value)
        if relu:
            value = np.maximum(value, 0)
        if saturates and is_float(target):
            value = np.clip(value, 0, 1)
        write(_cast(value, target, saturates), mask)

    return step


def _exact(target: str, source: str) -> bool:
    return is_float(source) and WIDTHS[target] > WIDTHS[source]


def _cast(value: Array, target: str, saturates: bool) -> Array:
    if target == "tf32":  # rna: to nearest with ties away, the lower 13 bits cleared
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    if is_float(target):
        return encode(value.astype(np.float32), "bf16") if target == "bf16" else value.astype(FLOATS[target])
    wanted = dtype(target, WIDTHS[target])
    limits = np.iinfo(wanted)
    if value.dtype.kind == "f":  # out of range goes to the nearest end, NaN to zero
        wide = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
        inside = np.clip(wide, float(limits.min), float(limits.max))
        result = np.where(wide >= float(limits.max), 0, inside).astype(wanted)
        return np.where(wide >= float(limits.max), wanted.type(limits.max), result)
    if saturates:
        low, high = max(limits.min, np.iinfo(value.dtype).min), min(limits.max, np.iinfo(value.dtype).max)
        value = np.clip(value, low, high)
    return value.astype(wanted)


def _to_halves(machine: Machine, each: Instruction, target: str, source: str) -> Step:
    """Two fp32 into one register: the first operand is the upper half."""
    if source != "f32":
        raise PtxError(f"cvt to {target} from {source}")
    high, low = machine.view(each.operands[1], "f32"), machine.view(each.operands[2], "f32")
    row = machine.view(each.operands[0], "b32")
    half = target.removesuffix("x2")
    relu = "relu" in each.parts

    def step(mask: Mask) -> None:
        both = np.stack((low, high), 1)
        if relu:
            both = np.maximum(both, 0)
        packed = np.ascontiguousarray(encode(both, half))
        np.copyto(row, packed.view(np.uint32)[:, 0], where=mask)

    return step


def _to_small(machine: Machine, each: Instruction, target: str, source: str) -> Step:
    if source == "f32":
        views = [machine.view(each.operands[2], "f32"), machine.view(each.operands[1], "f32")]
    elif source in HALVES:
        pairs = machine.view(each.operands[1], source)
        views = [pairs[:, 0], pairs[:, 1]]
    else:
        raise PtxError(f"cvt to {target} from {source}")
    half, relu = source.removesuffix("x2"), "relu" in each.parts
    write = machine.sink(each.operands[0], "b8" if target == "e2m1x2" else "b16")

    def step(mask: Mask) -> None:
        low, high = (decode(view, half).astype(np.float32) for view in views)
        if relu:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        if target == "e2m1x2":
            write(to_e2m1(low) | to_e2m1(high) << np.uint8(4), mask)
        else:
            codes = np.stack((to_fp8(low, target[:4]), to_fp8(high, target[:4])), 1)
            write(codes.view(np.uint16)[:, 0], mask)

    return step


def _from_small(machine: Machine, each: Instruction, target: str, source: str) -> Step:
    if target not in HALVES:
        raise PtxError(f"cvt from {source} to {target}")
    codes = machine.view(each.operands[1], "b8" if source == "e2m1x2" else "b16")
    row = machine.view(each.operands[0], "b32")

    def step(mask: Mask) -> None:
        if source == "e2m1x2":
            values = np.stack((E2M1_VALUES[codes & 15], E2M1_VALUES[codes >> 4]), 1)
        else:
            values = FP8_VALUES[source[:4]][np.ascontiguousarray(codes).view(np.uint8).reshape(-1, 2)]
        packed = to_bf16(values) if target == "bf16x2" else values.astype(np.float16)
        np.copyto(row, np.ascontiguousarray(packed).view(np.uint32)[:, 0], where=mask)

    return step
