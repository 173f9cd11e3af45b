"""Finds what the interpreter forgives: out-of-bounds lanes, races, and results that hang on undefined values.

Inside ``with sanitize():`` every launch of an interpreted kernel

* runs its programs in shuffled order, because a GPU promises none;
* checks every lane's address against the view its pointer came from (a neighbouring slice of the same storage is out
  of bounds), and its alignment;
* fills lanes that are masked off and have no ``other`` with NaN (integers: an absurd value), as hardware leaves them
  undefined;
* keeps, for every element, who wrote and who read it, and reports accesses that nothing orders;
* turns ``tl.device_assert`` on.

Order between programs comes from atomics alone: a releasing atomic publishes what its program did before the last
``tl.debug_barrier()`` (Triton 3.6 sets no barrier of its own before the atomic, so other warps' stores may still be on
their way), an acquiring one at the same address takes over what was published there. Order between the threads of one
program comes from ``tl.debug_barrier()`` and acquiring atomics; two accesses of one block shape whose lanes agree are
taken to be the same thread's.

Not modelled: spinning on another program's flag (programs run one after the other), and layouts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any, Literal

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.lab import interpreter
from headrace.kernels.lab.interpreter import Array, RepairedBuilder, RepairedExecutor, encode, stored_as
from headrace.kernels.lab.shadow import Access, Finding, Ordering, Shadow, View

Order = Literal["shuffle", "forward", "reverse"]

_MACHINERY = (os.path.dirname(triton.__file__), __file__, interpreter.__file__)


class SanitizerError(AssertionError):
    """A launch did what a GPU would not forgive. ``findings`` has one entry for each kind, source line and tensor."""

    def __init__(self, kernel: str, findings: Iterable[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("\n  ".join([f"{kernel}: {len(self.findings)} findings", *map(str, self.findings)]))


@cache
def _is_machinery(code: CodeType) -> bool:
    return code.co_filename.startswith(_MACHINERY)


@cache
def _all_lanes(count: int) -> Array:
    return np.arange(count, dtype=np.int32)


def _place() -> str:
    """The line of the kernel that runs now."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame.f_code):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _views(arguments: Mapping[str, Any]) -> Iterator[View]:
    """The tensors among the arguments, also inside of tuples and descriptors."""
    for name, argument in arguments.items():
        if isinstance(argument, tuple):
            yield from _views({f"{name}[{i}]": item for i, item in enumerate(argument)})
        elif isinstance(argument, TensorDescriptor):
            yield from _views({name: argument.base})
        elif hasattr(argument, "data_ptr"):
            tensor = stock._unwrap_tensor(argument)
            yield View.of(name, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.element_size())


def _absurd(dtype: Any) -> Array:
    """What a lane without a value holds: NaN, or an integer that cannot pass for an index."""
    if dtype.is_floating():
        return encode(np.array(np.nan, np.float32), dtype)
    stored = stored_as(dtype)
    return np.frombuffer(b"\x5a" * stored.itemsize, stored)[0] if stored != np.bool_ else np.array(True)


class SanitizingBuilder(RepairedBuilder):
    """The interpreter's operations, with a look at every address. ``shadow`` is that of the current launch."""

    shadow: Shadow
    order: Order
    random: np.random.Generator
    has_other = False

    # programs

    def set_grid_dim(self, *dimensions: int) -> None:
        super().set_grid_dim(*dimensions)
        turns = np.arange(np.prod(dimensions))
        if self.order == "shuffle":
            self.random.shuffle(turns)
        self.turns = iter(turns[::-1] if self.order == "reverse" else turns)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        """The launch loop asks for (x, y, z); the next program of the order runs instead."""
        super().set_grid_idx(*(int(i) for i in np.unravel_index(next(self.turns), self.grid_dim)))
        self.shadow.begin(str(self.grid_idx))

    def create_barrier(self) -> None:
        self.shadow.barrier()

    # accesses

    def _access(self, kind: str, ptr: Any, mask: Any) -> tuple[Any, Array, Array, Access]:
        """The mask without lanes that are out of bounds; the addresses of the rest, their lanes, and who they are."""
        data = ptr.data
        addresses = np.ascontiguousarray(data).view(np.int64).ravel()
        if mask.data.all():
            lanes = _all_lanes(data.size)
        else:
            lanes = np.flatnonzero(np.broadcast_to(mask.data, data.shape)).astype(np.int32)
            addresses = addresses[lanes]
        size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        access = Access(self.shadow.program, _place(), data.shape, size)
        good = self.shadow.in_bounds(kind, addresses, ptr.attr.get("origin"), access) if lanes.size else None
        if good is not None:
            addresses, lanes = addresses[good], lanes[good]
            kept = np.zeros(data.size, bool)
            kept[lanes] = True
            mask = TensorHandle(kept.reshape(data.shape), tl.int1)
        return mask, addresses, lanes, access

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *how: Any, **named: Any) -> Any:
        mask, addresses, lanes, access = self._access("load", ptrs, mask)
        if lanes.size:
            self.shadow.load(addresses, lanes, access)
        if other is None and not self.has_other and lanes.size < ptrs.data.size:
            dtype = ptrs.get_element_ty()
            other = TensorHandle(np.full(ptrs.data.shape, _absurd(dtype)), dtype)
        return super().create_masked_load(ptrs, mask, other, *how, **named)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *how: Any, **named: Any) -> Any:
        mask, addresses, lanes, access = self._access("store", ptrs, mask)
        if lanes.size:
            values = np.broadcast_to(value.data, ptrs.data.shape).ravel()[lanes]
            self.shadow.store(addresses, lanes, values, access)
        return super().create_masked_store(ptrs, value, mask, *how, **named)

    def _atomic(self, ptr: Any, mask: Any, sem: Any, scope: Any) -> Any:
        mask, addresses, lanes, access = self._access("atomic", ptr, mask)
        semantics = stock._ir.MEM_SEMANTIC
        ordering = Ordering(
            acquires=sem in (semantics.ACQUIRE, semantics.ACQUIRE_RELEASE),
            releases=sem in (semantics.RELEASE, semantics.ACQUIRE_RELEASE),
            local=scope == stock._ir.MEM_SYNC_SCOPE.CTA,
        )
        if lanes.size:
            self.shadow.atomic(addresses, lanes, ordering, access)
        return mask

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        return super().create_atomic_rmw(op, ptr, val, self._atomic(ptr, mask, sem, scope), sem, scope)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        everywhere = TensorHandle(np.ones(ptr.data.shape, bool), tl.int1)
        if not self._atomic(ptr, everywhere, sem, scope).data.all():
            return cmp  # it has no mask to leave lanes out with
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_load(self, ptr: Any, mask: Any, sem: Any, scope: Any) -> Any:
        mask = self._atomic(ptr, mask, sem, scope)
        return RepairedBuilder.create_masked_load(self, ptr, mask, None, None, True)

    def create_atomic_store(self, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        mask = self._atomic(ptr, mask, sem, scope)
        return RepairedBuilder.create_masked_store(self, ptr, val, mask, None)

    # where a pointer came from

    def _inherit(self, handle: Any, source: Any) -> Any:
        """``handle``, which was made from ``source``, points into the same view."""
        if isinstance(source.dtype, tl.pointer_type):
            if "origin" not in source.attr and source.data.size == 1:
                address = int(source.data.item())
                source.attr["origin"] = address if address in self.shadow.starts else None
            handle.attr["origin"] = source.attr.get("origin")
        return handle

    def create_addptr(self, ptr: Any, offset: Any) -> Any:
        return self._inherit(super().create_addptr(ptr, offset), ptr)

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        return self._inherit(super().create_splat(ret_ty, arg), arg)

    def create_broadcast(self, arg: Any, shape: Any) -> Any:
        return self._inherit(super().create_broadcast(arg, shape), arg)

    def create_expand_dims(self, arg: Any, axis: int) -> Any:
        return self._inherit(super().create_expand_dims(arg, axis), arg)

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        return self._inherit(super().create_bitcast(src, dst_type), src)


_load = TritonSemantic.load


def _load_noting_other(self: Any, ptr: Any, mask: Any, other: Any, *how: Any) -> Any:
    """``tl.load``, which on its way to the builder drops an ``other`` that is a single zero (a false scalar)."""
    self.builder.has_other = other is not None
    return _load(self, ptr, mask, other, *how)


class SanitizingExecutor(RepairedExecutor):
    """Launches a grid and raises what was found in it at the end; lanes that are out of bounds do nothing meanwhile."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, named = super()._init_args_hst(args_dev, kwargs)
        # a positional argument may follow its name in arg_names, keywords carry theirs
        stock.interpreter_builder.shadow = Shadow(list(_views(dict(zip(self.arg_names, args, strict=False)) | named)))
        return args, named

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        failure: Exception | None = None
        try:
            super().__call__(*args, **kwargs)
        except Exception as error:
            failure = error
        findings = stock.interpreter_builder.shadow.findings.values()
        if findings:
            raise SanitizerError(self.fn.__name__, findings) from failure
        if failure is not None:
            raise failure


@contextmanager
def sanitize(order: Order = "shuffle", seed: int = 0) -> Iterator[None]:
    """Check every launch inside the block; a launch with findings raises SanitizerError when it ends.

    ``order`` is that of the programs, and ``seed`` makes the shuffled one repeatable. Repairs the interpreter if that
    was not done yet, and raises what ``interpreter.install`` raises.
    """
    interpreter.install()
    builder = stock.interpreter_builder
    saved = builder.__class__, dict(vars(builder)), stock.GridExecutor, TritonSemantic.load
    builder.__class__, stock.GridExecutor = SanitizingBuilder, SanitizingExecutor
    TritonSemantic.load = _load_noting_other
    builder.order, builder.random = order, np.random.default_rng(seed)
    builder.options = stock.InterpreterOptions(debug=True, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.__class__, stock.GridExecutor, TritonSemantic.load = saved[0], *saved[2:]
        vars(builder).clear()
        vars(builder).update(saved[1])
