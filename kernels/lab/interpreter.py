"""Triton's interpreter with a GPU's arithmetic.

``TRITON_INTERPRET=1`` runs kernels on CPU tensors through numpy, which knows neither bf16 nor fp8: Triton then computes
with the raw bits (a bf16 dot multiplies uint16, a bf16 cast truncates, an fp8 cast loses a carry into the exponent).
``install`` computes on decoded values instead, so that a kernel can be compared with torch.

Two rules beyond that. Rounding follows the hardware where it shows: casts round to nearest even, fp8 casts saturate
(``cvt.rn.satfinite``), tf32 dots see 19 bits of each operand. And an element's bits never depend on the tile around it,
as they do not in ``mma.sync`` but do in BLAS: dots sum in float64 and round once, sums are a fixed tree.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.extra import libdevice as any_libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from headrace.kernels.lab.assembly import TWINS

CHECKED_VERSIONS = ("3.6.0", "3.9.0")

Array = np.ndarray[Any, Any]
Elementwise = Callable[..., Any]

ASSEMBLY: dict[str, Elementwise] = dict(TWINS)
"""Inline assembly text -> its numpy twin: arrays in, an array out (a tuple of arrays for several results)."""

LIBDEVICE: dict[str, Elementwise] = {
    "__nv_expf": np.exp,
    "__nv_exp2f": np.exp2,
    "__nv_expm1f": np.expm1,
    "__nv_fast_expf": np.exp,
    "__nv_fast_logf": np.log,
    "__nv_log1pf": np.log1p,
    "__nv_log2f": np.log2,
    "__nv_logf": np.log,
    "__nv_rintf": np.rint,
    "__nv_rsqrtf": lambda x: 1 / np.sqrt(x),
    "__nv_tanhf": np.tanh,
}
"""libdevice symbol -> its numpy twin."""

_TORCH_TYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_FP8_VALUES: dict[Any, Array] = {
    dtype: torch.arange(256, dtype=torch.uint8).view(twin).float().numpy()
    for dtype, twin in _TORCH_TYPES.items()
    if twin.itemsize == 1
}
_E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E8M0_VALUES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32)
_TF32_BITS = np.uint32(0xFFFFE000)


_stored_as = stock._get_np_dtype
_STORED: dict[str, Any] = {}


def stored_as(dtype: Any) -> Any:
    """The numpy dtype that holds a Triton dtype (Triton's function builds its table anew in every call)."""
    name = dtype.scalar.name
    if name not in _STORED:
        _STORED[name] = _stored_as(dtype.scalar)
    return _STORED[name]


def is_packed(handle: Any) -> bool:
    """Whether numpy holds the handle as bits, because it lacks the dtype (bf16, fp8)."""
    return handle.dtype.scalar in _TORCH_TYPES


def decode(handle: Any) -> Array:
    """A handle's values in a dtype numpy computes with: float32 for bf16 and fp8, else the data themselves."""
    dtype = handle.dtype.scalar
    data: Array = handle.data
    if dtype == tl.bfloat16:
        return np.left_shift(data, 16, dtype=np.uint32).view(np.float32)
    return _FP8_VALUES[dtype][data] if dtype in _FP8_VALUES else data


def encode(values: Array, dtype: Any) -> Array:
    """``values`` as the interpreter stores ``dtype``, rounded to nearest even; fp8 saturates, infinities too."""
    twin = _TORCH_TYPES.get(dtype)
    if twin is None:
        return values.astype(stored_as(dtype))
    if twin.itemsize == 1:
        largest = torch.finfo(twin).max
        values = np.clip(values, -largest, largest)
    rounded = torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(twin)
    bits: Array = rounded.view(torch.uint8 if twin.itemsize == 1 else torch.uint16).numpy()
    return bits


def _matmul(a: Array, b: Array, accumulator: Any) -> Any:
    total = np.matmul(a.astype(np.float64), b.astype(np.float64)) + accumulator.data
    return TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)


def _scaled_operand(handle: Any, scale: Any, element: Any, packed_axis: int, k_axis: int) -> Array:
    """One side of ``tl.dot_scaled`` as float32. Scales lie along K for both sides: [rows or columns, K / group]."""
    values: Array = decode(handle)
    if element == stock._ir.ScaleDotElemTypeTY.E2M1:  # two values a byte, the even one in the low nibble
        data = np.moveaxis(handle.data, packed_axis, -1)
        nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
        values = np.moveaxis(_E2M1_VALUES[nibbles], -1, packed_axis)
    if scale is None:
        return values
    factors = decode(scale) if is_packed(scale) else _E8M0_VALUES[scale.data.view(np.uint8)]
    factors = np.repeat(factors, values.shape[k_axis] // factors.shape[-1], axis=-1)
    scaled: Array = values * (factors if k_axis == -1 else np.swapaxes(factors, -1, -2))
    return scaled


class _Results:
    """What Triton expects of an operation with several results."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> Any:
        return self.handles[index]


class RepairedBuilder(InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's operations, on decoded values."""

    # casts

    def get_bf16(self, value: float) -> Any:
        return TensorHandle(encode(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return TensorHandle(encode(decode(src), dst_type.scalar), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode == stock._ir.ROUNDING_MODE.RTZ:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    # elementwise

    def unary_op(self, arg: Any, op: Elementwise) -> Any:
        # contiguous, because numpy may take another code path, with other bits, for strided data
        return TensorHandle(encode(op(np.ascontiguousarray(decode(arg))), arg.dtype.scalar), arg.dtype.scalar)

    def binary_op(self, lhs: Any, rhs: Any, op: Elementwise) -> Any:
        if not is_packed(lhs):
            return super().binary_op(lhs, rhs, op)
        output = op(decode(lhs), decode(rhs))
        dtype = tl.int1 if output.dtype == np.bool_ else lhs.dtype.scalar
        return TensorHandle(encode(output, dtype), dtype)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Elementwise) -> Any:
        if op is np.where or not is_packed(other):
            return super().ternary_op(lhs, rhs, other, op)
        dtype = other.dtype.scalar
        return TensorHandle(encode(op(decode(lhs), decode(rhs), decode(other)), dtype), dtype)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not is_packed(z) and hasattr(stock._interpreter, "fma_fp32"):
            return super().create_fma(x, y, z)
        exact = decode(x).astype(np.float64) * decode(y) + decode(z)
        return TensorHandle(encode(exact, z.dtype.scalar), z.dtype.scalar)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    # dots

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = decode(a), decode(b)
        if a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            x, y = ((np.ascontiguousarray(v).view(np.uint32) & _TF32_BITS).view(np.float32) for v in (x, y))
        return _matmul(x, y, d)

    def create_dot_scaled(
        self,
        lhs: Any,
        lhs_scale: Any,
        lhs_format: Any,
        rhs: Any,
        rhs_scale: Any,
        rhs_format: Any,
        fast_math: bool,
        lhs_k_pack: bool,
        rhs_k_pack: bool,
        accumulator: Any,
    ) -> Any:
        left = _scaled_operand(lhs, lhs_scale, lhs_format, -1 if lhs_k_pack else -2, k_axis=-1)
        right = _scaled_operand(rhs, rhs_scale, rhs_format, -2 if rhs_k_pack else -1, k_axis=-2)
        return _matmul(left, right, accumulator)

    # atomics

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if val.dtype.scalar != tl.bfloat16:
            return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)
        if op not in (stock._ir.ATOMIC_OP.FADD, stock._ir.ATOMIC_OP.XCHG):
            raise NotImplementedError(f"bf16 atomics add and exchange, they do not {op}")
        before = np.zeros(val.data.shape, np.uint16)
        everywhere = np.array([True])
        for lane in map(tuple, np.argwhere(mask.data)):  # one by one: lanes may share an address
            address = np.array([ptr.data[lane]])
            old = stock._interpreter.load(address, everywhere, np.zeros(1, np.uint16), np.dtype(np.uint16))
            new = TensorHandle(np.array([val.data[lane]]), tl.bfloat16)
            if op == stock._ir.ATOMIC_OP.FADD:
                new = self.binary_op(TensorHandle(old, tl.bfloat16), new, np.add)
            stock._interpreter.store(address, new.data, everywhere)
            before[lane] = old[0]
        return TensorHandle(before, tl.bfloat16)

    # foreign code

    def create_inline_asm(self, text: str, constraints: Any, values: Any, types: Any, pure: Any, pack: Any) -> Any:
        if text not in ASSEMBLY:
            raise NotImplementedError(f"ASSEMBLY has no numpy twin of {text!r}")
        outputs = ASSEMBLY[text](*(decode(value) for value in values))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return _Results([TensorHandle(encode(o, t.scalar), t.scalar) for o, t in zip(outputs, types, strict=True)])

    def create_extern_elementwise(self, lib: str, path: str, symbol: str, args: Any, result: Any, pure: bool) -> Any:
        if symbol not in LIBDEVICE:
            raise NotImplementedError(f"LIBDEVICE has no numpy twin of {symbol}")
        output = LIBDEVICE[symbol](*(np.ascontiguousarray(decode(arg)) for arg in args))
        return TensorHandle(encode(output, result.scalar), result.scalar)


def _combine(scan: Any, tensors: Any, left: list[Array], right: list[Array]) -> list[Array]:
    """The custom combine function of a reduction or scan, applied to whole arrays at once."""
    operands = [scan.to_tensor(part, t.dtype) for part, t in zip((*left, *right), (*tensors, *tensors), strict=True)]
    results = scan.combine_fn.fn(*operands)
    results = results if isinstance(results, tuple) else (results,)
    arrays = [r.handle.data if isinstance(r, tl.core.tensor) else np.asarray(r) for r in results]
    return [np.broadcast_to(a, part.shape).astype(part.dtype) for a, part in zip(arrays, left, strict=True)]


class RepairedReduce(ReduceOps):  # type: ignore[misc]
    """Reductions in an order that depends on the length alone; bf16 and fp8 in float32, rounded once."""

    def _lined_up(self, data: Array) -> Array:
        """``data`` with the reduced axis last."""
        return data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, -1)

    def _result(self, reduced: Array, like: Any, dtype: Any) -> Any:
        """The tensor of ``reduced``, whose last axis has length 1 and stays only if the kernel keeps dimensions."""
        if not self.keep_dims:
            reduced = reduced[..., 0]
        elif self.axis is None:
            reduced = reduced.reshape([1] * like.handle.data.ndim)
        else:
            reduced = np.moveaxis(reduced, -1, self.axis)
        return self.to_tensor(reduced, dtype)

    def sum(self, input: Any) -> Any:
        total = self._lined_up(decode(input.handle))
        if np.issubdtype(total.dtype, np.floating):
            while (half := total.shape[-1] // 2) > 0:
                total = total[..., :half] + total[..., half:]
        else:
            total = np.sum(total, axis=-1, keepdims=True)
        return self._result(encode(total, input.dtype), input, input.dtype)

    def min_max(self, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        """NaN loses against every number; of equal values the leftmost is meant."""
        tensor = input[0] if isinstance(input, tuple) else input
        data = self._lined_up(decode(tensor.handle))
        pick = np.fmax if val_reduce_op in (np.max, np.nanmax) else np.fmin
        extreme = pick.reduce(data, axis=-1, keepdims=True)
        value = self._result(encode(extreme, tensor.dtype), tensor, tensor.dtype)
        if idx_reduce_op is None:
            return value
        return value, self._result(np.argmax(data == extreme, axis=-1, keepdims=True), tensor, tl.int32)

    def generic_reduce(self, input: Any) -> Any:
        parts = [self._lined_up(tensor.handle.data) for tensor in input]
        while parts[0].shape[-1] > 1:
            parts = _combine(self, input, [p[..., 0::2] for p in parts], [p[..., 1::2] for p in parts])
        return [self._result(part, tensor, tensor.dtype) for part, tensor in zip(parts, input, strict=True)]


class RepairedScan(ScanOps):  # type: ignore[misc]
    """Scans; bf16 and fp8 in float32 with each element rounded once, custom ones in log2(length) steps."""

    def _accumulate(self, ufunc: np.ufunc, input: Any) -> list[Any]:
        total = ufunc.accumulate(decode(input.handle), axis=self.axis)
        return [self.to_tensor(encode(total, input.dtype), input.dtype)]

    def cumsum(self, input: Any) -> list[Any]:
        return self._accumulate(np.add, input)

    def cumprod(self, input: Any) -> list[Any]:
        return self._accumulate(np.multiply, input)

    def generic_scan(self, input: Any) -> list[Any]:
        parts = [np.moveaxis(tensor.handle.data, self.axis, -1) for tensor in input]
        length, distance = parts[0].shape[-1], 1
        while distance < length:
            combined = _combine(self, input, [np.roll(p, distance, axis=-1) for p in parts], parts)
            first = np.arange(length) < distance
            parts = [np.where(first, before, after) for before, after in zip(parts, combined, strict=True)]
            distance *= 2
        return [self.to_tensor(np.moveaxis(p, -1, self.axis), t.dtype) for p, t in zip(parts, input, strict=True)]


class RepairedExecutor(GridExecutor):  # type: ignore[misc]
    """Launches a grid. Overflow, 0/0 and the like give their IEEE results without numpy's warnings."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            super().__call__(*args, **kwargs)


def _check_environment() -> None:
    if triton.__version__ not in CHECKED_VERSIONS:
        raise RuntimeError(
            f"the repair of Triton's interpreter was checked on {' and '.join(CHECKED_VERSIONS)}, "
            f"not on the installed {triton.__version__}"
        )
    if not isinstance(tl.standard.sum, stock.InterpretedFunction):
        raise RuntimeError(
            "TRITON_INTERPRET=1 must be set before triton is imported, and this process imported it to compile "
            f"(TRITON_INTERPRET is now {os.environ.get('TRITON_INTERPRET')!r})"
        )


def _reflected(operation: Elementwise) -> Elementwise:
    return lambda self, other: tl.constexpr(operation(other, self.value))


def _patch_language() -> None:
    """Let ``tl`` and libdevice interpret, once and for all (Triton patches ``tl`` again in every call)."""
    scope = stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    stock._patch_builtin(cuda_libdevice, stock.interpreter_builder, scope)
    for name, function in vars(cuda_libdevice).items():
        if hasattr(any_libdevice, name) and not name.startswith("_"):
            setattr(any_libdevice, name, function)
    # Triton 3.6 converts arrays of one element, which numpy has come to refuse.
    tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
    # The compiler's static_range counts in constexpr, the interpreter's in int, which meets constexpr from the left.
    for name in ("mod", "and", "or", "xor", "lshift", "rshift"):
        if not hasattr(tl.constexpr, f"__r{name}__"):
            setattr(tl.constexpr, f"__r{name}__", _reflected(getattr(operator, f"__{name}__")))
    stock._patch_lang = lambda _: stock._LangPatchScope()


def install() -> None:
    """Repair the interpreter of this process; a second call does nothing.

    Raises RuntimeError on a Triton version the repair was not checked on, and where triton was imported to compile.
    """
    _check_environment()
    builder = stock.interpreter_builder
    if isinstance(builder, RepairedBuilder):
        return
    # Triton keeps several references to its one builder, so it changes its class in place.
    builder.__class__ = RepairedBuilder
    builder.options = stock.InterpreterOptions(sanitize_overflow=False)  # its result is used in debug mode only
    builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))  # as strict as the compiler
    stock.ReduceOps, stock.ScanOps, stock.GridExecutor = RepairedReduce, RepairedScan, RepairedExecutor
    stock._get_np_dtype = stored_as
    _patch_language()
