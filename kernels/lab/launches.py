"""What an op launches: capture it without a GPU, or execute its compiled PTX on the CPU in place of the launch.

    with capture(90) as launches:        # nothing runs; meta tensors do
        experts(x, up, down, route)
    with execute(90) as executions:      # every launch is compiled and run on the CPU tensors, in order
        experts(x, up, down, route)

Specialisation is not imitated: the binder of Triton's own launcher decides which arguments are divisible by 16, equal
to one, or compile-time constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from headrace.kernels.triton import target

if TYPE_CHECKING:
    from headrace.kernels.lab.compile import Compiled
    from headrace.kernels.lab.ptx import Statistics

Grid = tuple[int, int, int]

MOST_CTAS = (2**31 - 1, 65535, 65535)
"""Extents that CUDA accepts of a grid, along x, y and z."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One ``kernel[grid](...)`` as the launcher would specialise it for ``arch``."""

    fn: Any  # triton's JITFunction
    arch: int
    arguments: Mapping[str, Any]  # every parameter by name: tensors, numbers, compile-time constants
    grid: Grid
    options: Any  # the backend's options: num_warps, num_stages, ...
    signature: Mapping[str, Any]  # parameter -> "*bf16", "i32", "constexpr", or a tuple of these
    constants: Mapping[tuple[int, ...], Any]  # path of parameter indices -> compile-time value
    attributes: Mapping[tuple[int, ...], Any]  # path -> what is known of the value ([["tt.divisibility", 16]])

    @property
    def name(self) -> str:
        return str(self.fn.fn.__name__)

    @property
    def constexprs(self) -> dict[str, Any]:
        """Compile-time values by parameter name, arguments specialised to 1 or None included."""
        return {self.fn.arg_names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def parameters(self) -> list[tuple[str, Any]]:
        """What the compiled kernel receives, in order: (name, value) of everything that is not a constant."""
        found: list[tuple[str, Any]] = []
        for name, type_ in self.signature.items():
            _flatten(name, type_, self.arguments[name], found)
        return found

    def divisible(self) -> set[str]:
        """Names of the arguments that the compiler may assume divisible by 16."""
        return {self.fn.arg_names[path[0]] for path, known in self.attributes.items() if known}


@dataclass(frozen=True, eq=False)
class Execution:
    """One launch that ran on the CPU: what was compiled, and what its execution counted."""

    launch: Launch
    compiled: Compiled
    statistics: Statistics


@contextmanager
def capture(arch: int) -> Iterator[list[Launch]]:
    """Record every launch made inside, for ``arch``, and run nothing: outputs keep what was in memory."""
    launches: list[Launch] = []
    with divert(arch, launches.append):
        yield launches


@contextmanager
def execute(arch: int) -> Iterator[list[Execution]]:
    """Compile every launch made inside for ``arch`` and execute its PTX over the whole grid, on CPU tensors."""
    from headrace.kernels.lab.compile import compile_launch
    from headrace.kernels.lab.ptx import run

    executions: list[Execution] = []

    def execute_one(launch: Launch) -> None:
        compiled = compile_launch(launch)
        executions.append(Execution(launch, compiled, run(compiled, launch)))

    with divert(arch, execute_one):
        yield executions


@contextmanager
def divert(arch: int, receive: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch inside to ``receive`` instead of the driver. Raises RuntimeError under TRITON_INTERPRET."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter and the compiler cannot share a process")
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        receive(specialise(self, arch, grid, args, kwargs))

    JITFunction.run = run
    try:
        with target.override(arch):
            yield
    finally:
        JITFunction.run = original


def specialise(fn: Any, arch: int, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The launch of ``fn[grid](*args, **kwargs)`` on a device of ``arch``; the arguments are not touched.

    Raises ValueError for a grid that the driver would refuse.
    """
    backend = _backend(arch)
    options = dict(kwargs, debug=kwargs.get("debug", fn.debug) or False)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, _ = binder(*args, **options)
    parsed, signature, constants, attributes = fn._pack_args(backend, options, bound, specialization, None)
    if callable(grid):
        grid = grid(bound)
    grid = tuple(int(extent) for extent in grid) + (1,) * (3 - len(grid))
    for axis, extent, most in zip("xyz", grid, MOST_CTAS, strict=True):
        if extent > most:
            raise ValueError(f"{fn.fn.__name__}: a grid of {extent} along {axis}, where a GPU takes at most {most}")
    return Launch(fn, arch, bound, grid, parsed, signature, constants, attributes)


@functools.cache
def _backend(arch: int) -> Any:
    return make_backend(GPUTarget("cuda", arch, 32))


def _flatten(name: str, type_: Any, value: Any, into: list[tuple[str, Any]]) -> None:
    if type_ == "constexpr":
        return
    if isinstance(type_, tuple):
        for index, (inner, item) in enumerate(zip(type_, value, strict=True)):
            _flatten(f"{name}.{index}", inner, item, into)
        return
    if isinstance(type_, str) and type_.startswith("*") and not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: a pointer argument must be a tensor, not {type(value).__name__}")
    into.append((name, value))
