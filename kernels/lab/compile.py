"""Compile a captured launch for any NVIDIA architecture, and read from the machine code what it costs.

Triton compiles ahead of time without a driver; ``cuobjdump`` and ``nvdisasm`` come with its wheel.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headrace.kernels.lab.launches import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = 32


@dataclass(frozen=True, slots=True)
class Architecture:
    """What one SM holds (CUDA C++ programming guide, technical specifications per compute capability)."""

    shared_per_sm: int  # bytes
    shared_per_cta: int  # bytes, the opt-in limit
    warps: int
    ctas: int
    sms: int  # of the largest part sold: A100, RTX 3090 Ti, RTX 4090, H200, B200, RTX PRO 6000
    registers: int = 65536
    registers_per_thread: int = 255


LIMITS: Mapping[int, Architecture] = {
    80: Architecture(shared_per_sm=167_936, shared_per_cta=166_912, warps=64, ctas=32, sms=108),
    86: Architecture(shared_per_sm=102_400, shared_per_cta=101_376, warps=48, ctas=16, sms=84),
    89: Architecture(shared_per_sm=102_400, shared_per_cta=101_376, warps=48, ctas=24, sms=128),
    90: Architecture(shared_per_sm=233_472, shared_per_cta=232_448, warps=64, ctas=32, sms=132),
    100: Architecture(shared_per_sm=233_472, shared_per_cta=232_448, warps=64, ctas=32, sms=148),
    103: Architecture(shared_per_sm=233_472, shared_per_cta=232_448, warps=64, ctas=32, sms=160),
    120: Architecture(shared_per_sm=102_400, shared_per_cta=101_376, warps=48, ctas=24, sms=188),
}
SHARED_RESERVED = 1024  # bytes of shared memory the system keeps for every resident CTA
REGISTER_UNIT = 256  # registers are handed to a warp in units of this


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel costs. Counts are of instructions in the code, not of executed ones."""

    registers: int  # per thread
    spill_loads: int
    spill_stores: int
    local_bytes: int  # per thread: stack and spills
    shared_bytes: int  # per CTA, static and dynamic
    threads: int  # per CTA
    instructions: int
    loads: Mapping[int, int]  # global loads to registers: bits a lane -> count
    async_loads: Mapping[int, int]  # global loads to shared memory (LDGSTS): bits a lane -> count
    stores: Mapping[int, int]  # global stores: bits a lane -> count
    mma: Mapping[str, int]  # tensor-core opcode with its shape and types -> count
    occupancy: int  # CTAs an SM holds; 0: the kernel cannot launch
    opcodes: Mapping[str, int] = field(repr=False)

    @property
    def spills(self) -> int:
        return self.spill_loads + self.spill_stores


class Compiled:
    """One kernel compiled for one architecture."""

    def __init__(self, kernel: Any, arch: int) -> None:
        self.kernel, self.arch = kernel, arch
        self.ptx = str(kernel.asm["ptx"])
        self.cubin = bytes(kernel.asm["cubin"])
        self.shared_bytes = int(kernel.metadata.shared)
        self.threads = int(kernel.metadata.num_warps) * WARP
        self.name = str(kernel.metadata.name)

    @functools.cached_property
    def sass(self) -> str:
        """The machine code as text."""
        return self._tool("nvdisasm", "-c", "-ndf")  # no data-flow analysis, which takes most of the time

    def report(self) -> Resources:
        return self._resources

    @functools.cached_property
    def _resources(self) -> Resources:
        usage = {
            key: int(value)
            for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", self._tool("cuobjdump", "-res-usage"))
        }
        opcodes = count_opcodes(self.sass)
        registers = usage["REG"]
        shared = max(self.shared_bytes, usage["SHARED"])
        return Resources(
            registers=registers,
            spill_loads=_count(opcodes, r"LDL\b"),
            spill_stores=_count(opcodes, r"STL\b"),
            local_bytes=usage["STACK"] + usage["LOCAL"],
            shared_bytes=shared,
            threads=self.threads,
            instructions=sum(opcodes.values()),
            loads=_widths(opcodes, "LDG"),
            async_loads=_widths(opcodes, "LDGSTS"),
            stores=_widths(opcodes, "STG"),
            mma={name: n for name, n in sorted(opcodes.items()) if name.split(".")[0].endswith("MMA")},
            occupancy=occupancy(self.arch, registers, shared, self.threads),
            opcodes=opcodes,
        )

    def _tool(self, tool: str, *flags: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(TOOLS / tool), *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_compiled: dict[str, Compiled] = {}


def compile_launch(launch: Launch, arch: int | None = None) -> Compiled:
    """Compile ``launch`` for ``arch`` (default: the one it was captured for); once per process and specialisation.

    Raises ValueError if the kernel needs more shared memory than a CTA may have on ``arch``: Triton compiles it all
    the same and only the launch would fail.
    """
    arch = launch.arch if arch is None else arch
    key = repr((launch.fn.cache_key, arch, launch.signature, launch.constants, launch.attributes, launch.options))
    if key not in _compiled:
        source = ASTSource(launch.fn, launch.signature, launch.constants, launch.attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=launch.options.__dict__)
        _compiled[key] = Compiled(kernel, arch)
    compiled = _compiled[key]
    allowed = LIMITS[arch].shared_per_cta
    if compiled.shared_bytes > allowed:
        raise ValueError(f"{launch.name}: {compiled.shared_bytes} bytes of shared memory, sm_{arch} allows {allowed}")
    return compiled


def occupancy(arch: int, registers: int, shared: int, threads: int) -> int:
    """CTAs resident on one SM: the least of what warps, registers, shared memory and the CTA limit allow."""
    limit = LIMITS[arch]
    warps = -(-threads // WARP)
    register_units = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = limit.registers // register_units // warps
    by_shared = limit.shared_per_sm // (shared + SHARED_RESERVED) if shared <= limit.shared_per_cta else 0
    return min(limit.ctas, limit.warps // warps, by_registers, by_shared)


def count_opcodes(sass: str) -> Counter[str]:
    """Opcode with its modifiers -> number of times it stands in the machine code; padding NOPs left out."""
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return Counter(name for name in opcode.findall(sass) if name != "NOP")


def _count(opcodes: Mapping[str, int], pattern: str) -> int:
    return sum(count for name, count in opcodes.items() if re.match(pattern, name))


def _widths(opcodes: Mapping[str, int], opcode: str) -> dict[int, int]:
    """Bits a lane -> count, widest first. An access without a width modifier is 32 bits."""
    widths: Counter[int] = Counter()
    for name, count in opcodes.items():
        first, *modifiers = name.split(".")
        if first == opcode:
            bits = [int(found[1]) for part in modifiers if (found := re.fullmatch(r"[US]?(8|16|64|128|256)", part))]
            widths[bits[0] if bits else 32] += count
    return dict(sorted(widths.items(), reverse=True))
