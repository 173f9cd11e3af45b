"""An executor of compiled PTX on the CPU: what the code computes, what it touches, what it does wrong.

``run`` executes chosen CTAs of a launch on its CPU tensors. It raises PtxError on accesses out of a tensor's bounds or
misaligned, on races between warps in shared memory, on asynchronous copies used before their wait, on divergent
barriers, and on instructions it does not have (wgmma, tcgen05 and TMA among them). Not modelled: interleaving of warps
and of CTAs, L1, errors of approximate instructions, the tensor cores' own order of sums.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headrace.kernels.lab.ptx import access, arithmetic, bits, convert, exchange, matrix
from headrace.kernels.lab.ptx.device_memory import DeviceMemory, pointer_roots, registers
from headrace.kernels.lab.ptx.machine import Machine
from headrace.kernels.lab.ptx.parse import Program, PtxError, parse
from headrace.kernels.lab.ptx.shared_memory import AsyncCopyError, RaceError
from headrace.kernels.lab.ptx.statistics import SECTOR, Statistics, Traffic

if TYPE_CHECKING:
    from headrace.kernels.lab.compile import Compiled
    from headrace.kernels.lab.launches import Launch

__all__ = ["SECTOR", "AsyncCopyError", "PtxError", "RaceError", "Statistics", "Traffic", "load_widths", "run"]

INSTRUCTIONS = (access, arithmetic, bits, convert, exchange, matrix)  # imported for the builders they register

Cta = tuple[int, int, int]
FLOAT_FORMATS = {"f16": "<e", "f32": "<f", "f64": "<d", "fp16": "<e", "fp32": "<f", "fp64": "<d"}

_programs = functools.lru_cache(maxsize=64)(parse)


def run(
    compiled: Compiled, launch: Launch, ctas: Sequence[Cta] | Mapping[Cta, float] | None = None, *, ptx: str = ""
) -> Statistics:
    """Execute ``ctas`` of the launch (None: the whole grid, in launch order) on its tensors, which it may change.

    A mapping gives each CTA the number of CTAs it stands for in the counts. ``ptx`` replaces the compiled text.
    Where less than the grid runs, what atomics update (counters of arrivals) is afterwards as it was.
    """
    machine = load(compiled, launch, ptx=ptx)
    if ctas is None:
        x, y, z = launch.grid
        ctas = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    weights = ctas if isinstance(ctas, Mapping) else dict.fromkeys(ctas, 1.0)
    updated = machine.atomic_arguments() if len(weights) < launch.ctas else ()
    before = {name: machine.memory.buffers[name].window.copy() for name in updated}
    for cta, weight in weights.items():
        machine.run_cta(cta, weight)
    for name, content in before.items():
        machine.memory.buffers[name].window[:] = content
    machine.count_instructions()
    return machine.statistics


def load_widths(compiled: Compiled, launch: Launch) -> dict[str, dict[int, int]]:
    """Argument -> bits a lane -> how many loads (to registers or asynchronous) of it stand in the PTX."""
    program = _programs(compiled.ptx)
    pointers = {
        parameter: name for parameter, name, value in _bound(program, launch) if isinstance(value, torch.Tensor)
    }
    roots = pointer_roots(program, set(pointers))
    found: dict[str, dict[int, int]] = {}
    for each in program.instructions:
        size = access.loaded_bits(each)
        mentioned = registers(each.operands[1]) if size else []
        for root in frozenset().union(*(roots.get(register, frozenset()) for register in mentioned)):
            widths = found.setdefault(pointers[root], {})
            widths[size] = widths.get(size, 0) + 1
    return found


def load(compiled: Compiled, launch: Launch, *, ptx: str = "") -> Machine:
    """The machine with the kernel and the launch's arguments in it."""
    program = _programs(ptx or compiled.ptx)
    program.threads = program.threads or compiled.threads
    tensors: dict[str, torch.Tensor] = {}
    pointers: dict[str, str] = {}
    kinds = dict(program.parameters)
    patterns = dict.fromkeys(kinds, 0)
    for parameter, name, value in _bound(program, launch):
        kind = kinds[parameter]
        if isinstance(value, torch.Tensor):
            tensors[name], pointers[parameter] = value, name
            patterns[parameter] = value.data_ptr()
        elif kind in FLOAT_FORMATS or isinstance(value, float):
            patterns[parameter] = int.from_bytes(struct.pack(FLOAT_FORMATS.get(kind, "<f"), float(value)), "little")
        else:
            patterns[parameter] = int(value) & (2**64 - 1)
    memory = DeviceMemory(tensors, program.constants, Statistics())
    return Machine(program, memory, patterns, pointers, launch.grid, compiled.shared_bytes)


def _bound(program: Program, launch: Launch) -> list[tuple[str, str, Any]]:
    """(parameter, argument, value) of what the launch passes. Raises PtxError if the kernel takes something else."""
    given = launch.parameters()
    extra = len(program.parameters) - len(given)
    if not 0 <= extra <= 2:  # Triton appends pointers to scratch memory, which kernels here do not use
        raise PtxError(f"{program.name} takes {len(program.parameters)} parameters, the launch has {len(given)}")
    return [(parameter, *rest) for (parameter, _), rest in zip(program.parameters, given, strict=False)]
