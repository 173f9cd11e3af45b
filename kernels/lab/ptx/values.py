"""Types of PTX as numpy sees them, and the roundings numpy does not have (bf16, fp8, fp4, one rounding in fma)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = Array | bool
"""Which lanes an instruction applies to: True for every one, else booleans [threads]."""

UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, type[np.signedinteger[Any]]] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS: dict[str, type[np.floating[Any]]] = {
    "f16": np.float16,
    "f32": np.float32,
    "tf32": np.float32,
    "f64": np.float64,
}
PACKED = {"f32x2": "f32", "f16x2": "f16", "bf16x2": "bf16", "u16x2": "u16", "s16x2": "s16"}


def dtype(kind: str, bits: int) -> np.dtype[Any]:
    """The numpy type in which a register is read as PTX type ``kind``; bf16 is read as its pattern."""
    if kind == "pred":
        return np.dtype(np.bool_)
    if kind in FLOATS:
        return np.dtype(FLOATS[kind])
    if kind[0] == "s" and "x" not in kind:
        return np.dtype(SIGNED[bits])
    return np.dtype(UNSIGNED[bits])


def is_float(kind: str) -> bool:
    return PACKED.get(kind, kind) in ("f16", "bf16", "f32", "tf32", "f64")


def from_bf16(pattern: Array) -> Array:
    return (pattern.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: Array) -> Array:
    """fp32 -> bf16 pattern, to nearest even; NaN becomes the canonical 0x7FFF."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def decode(pattern: Array, kind: str) -> Array:
    """Registers as numbers: fp32 for bf16 (numpy has none), the array itself otherwise."""
    return from_bf16(pattern) if kind == "bf16" else pattern


def encode(value: Array, kind: str) -> Array:
    return to_bf16(value) if kind == "bf16" else value.astype(FLOATS[kind], copy=False)


def fused(a: Array, b: Array, c: Array, kind: str) -> Array:
    """a * b + c rounded once, as a register's content of type ``kind`` (operands are decoded)."""
    if kind == "f64":
        return a * b + c  # two roundings; no kernel here multiplies in fp64
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: twice 24 bits fit 53
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # what the fp64 sum lost (Knuth's two-sum)
    bits = total.view(np.int64)
    # Round to odd where something was lost, so that the second rounding cannot meet a false tie.
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    if inexact.any():
        toward = np.where((error > 0) == (total > 0), 1, -1)
        bits = np.where(inexact, bits + np.where(toward > 0, 1, -1), bits)
        total = bits.view(np.float64)
    if kind == "bf16":
        return _odd_then_bf16(total)
    return total.astype(FLOATS[kind])


def _odd_then_bf16(total: Array) -> Array:
    """fp64 -> bf16 through fp32 with round to odd, which makes the two steps one rounding."""
    single = total.astype(np.float32)
    bits = single.view(np.int32)
    lost = (single.astype(np.float64) != total) & np.isfinite(single) & ((bits & 1) == 0)
    grew = np.abs(total) > np.abs(single.astype(np.float64))
    return to_bf16(np.where(lost, bits + np.where(grew, 1, -1), bits).astype(np.int32).view(np.float32))


def _table(kind: torch.dtype) -> Array:
    table: Array = torch.arange(256, dtype=torch.uint8).view(kind).float().numpy()
    return table


_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_FP8_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FP8_VALUES = {name: _table(kind) for name, kind in _FP8.items()}  # code -> fp32
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def to_fp8(value: Array, kind: str) -> Array:
    """fp32 -> code, to nearest even, beyond the largest to the largest (the only form PTX has), NaN stays NaN."""
    largest = _FP8_LARGEST[kind]
    clipped = torch.from_numpy(np.ascontiguousarray(np.clip(value, -largest, largest), np.float32))
    codes: Array = clipped.to(_FP8[kind]).view(torch.uint8).numpy()
    return codes


def to_e2m1(value: Array) -> Array:
    """fp32 -> 4-bit code, to nearest, ties to the even code, beyond 6 to 6; NaN to 6."""
    magnitude = np.minimum(np.abs(np.nan_to_num(value, nan=6.0)), 6.0)
    between = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    code = np.searchsorted(between, magnitude, "left").astype(np.uint8)  # a tie goes down ...
    tie = (code < 7) & (between[np.minimum(code, 6)] == magnitude) & (code & 1 == 1)
    code = code + tie.astype(np.uint8)  # ... unless down is odd
    return np.where(np.signbit(value) & ~np.isnan(value), code | 8, code).astype(np.uint8)


def flush(value: Array) -> Array:
    """Subnormal fp32 to zero of the same sign, as ``.ftz`` does."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)
