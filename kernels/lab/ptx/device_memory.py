"""Global memory: the arguments of a launch, where each access is bounds-checked against the tensor it belongs to."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.kernels.lab.ptx.parse import (
    Address,
    Instruction,
    Negated,
    Pair,
    Program,
    PtxError,
    Register,
    Symbol,
    Vector,
)
from headrace.kernels.lab.ptx.statistics import SECTOR, Statistics, Traffic
from headrace.kernels.lab.ptx.values import UNSIGNED, Array

ALIGN = 32  # the numpy window of a buffer starts at a multiple of this, so that any component type can index it


@dataclass
class Buffer:
    """The memory of one argument, from its first to its last element; holes of a strided view count as inside."""

    name: str
    start: int  # address of the first byte
    end: int  # address after the last byte
    window: Array  # bytes from ``origin``; only those of the view are ever touched
    loads: Traffic
    stores: Traffic

    @property
    def origin(self) -> int:
        return self.start // ALIGN * ALIGN


class DeviceMemory:
    """The tensors a launch was given, by argument name, and the constants of its module."""

    def __init__(self, tensors: dict[str, torch.Tensor], constants: dict[str, bytes], statistics: Statistics) -> None:
        self.statistics = statistics
        self.cta = (0, 0, 0)  # which one is running, for messages
        self.buffers: dict[str, Buffer] = {}
        self.kept: list[Array] = []
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise PtxError(f"argument {name} is on {tensor.device}: only CPU tensors can be executed on")
            start = tensor.data_ptr()
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in strides) if tensor.numel() else -1
            self._add(name, start, start + (last + 1) * tensor.element_size())
        for name, content in constants.items():
            held = np.frombuffer(content + bytes(ALIGN), np.uint8).copy()
            self.kept.append(held)
            self._add(name, held.ctypes.data, held.ctypes.data + len(content))

    def _add(self, name: str, start: int, end: int) -> None:
        origin, limit = start // ALIGN * ALIGN, -(-end // ALIGN) * ALIGN
        block = (ctypes.c_uint8 * max(limit - origin, 0)).from_address(origin)
        loads, stores = Traffic(), Traffic()
        self.buffers[name] = Buffer(name, start, end, np.ctypeslib.as_array(block), loads, stores)
        self.statistics.loads[name], self.statistics.stores[name] = loads, stores
        self.statistics.extents[name] = (limit - origin) // SECTOR

    def finish_cta(self, weight: float) -> None:
        for buffer in self.buffers.values():
            buffer.loads.finish_cta(weight)
            buffer.stores.finish_cta(weight)

    def site(self, instruction: Instruction, names: Iterable[str], size: int) -> Site:
        """The accesses of one instruction, which by its address arithmetic belong to the arguments ``names``
        (none: the pointer came from memory, any argument may be meant)."""
        chosen = [self.buffers[name] for name in names] or list(self.buffers.values())
        return Site(self, instruction, chosen, size)


class Site:
    """One load, store, copy or atomic of ``size`` bytes a lane."""

    def __init__(self, memory: DeviceMemory, instruction: Instruction, buffers: Sequence[Buffer], size: int) -> None:
        self.memory, self.instruction, self.buffers, self.size = memory, instruction, buffers, size

    def load(self, addresses: Array, lanes: Array, bits: int) -> tuple[Array, int]:
        """Components [lanes, size * 8 / bits] at ``addresses`` [lanes], and the bytes of their sectors."""
        count = self.size * 8 // bits
        parts = self._locate(addresses)
        values = np.empty((len(addresses), count), UNSIGNED[bits])
        fetched = 0
        for buffer, chosen in parts:
            where = addresses if chosen is None else addresses[chosen]
            fetched += self._count(buffer.loads, where, lanes if chosen is None else lanes[chosen])
            index = self._index(buffer, where, bits, count)
            if chosen is None:
                values = buffer.window.view(UNSIGNED[bits])[index]
            else:
                values[chosen] = buffer.window.view(UNSIGNED[bits])[index]
        return values, fetched

    def store(self, addresses: Array, lanes: Array, values: Array, bits: int) -> None:
        """Write components [lanes, n] at ``addresses`` [lanes]; of lanes at one address the last stays."""
        for buffer, chosen in self._locate(addresses):
            where = addresses if chosen is None else addresses[chosen]
            self._count(buffer.stores, where, lanes if chosen is None else lanes[chosen])
            index = self._index(buffer, where, bits, values.shape[1])
            buffer.window.view(UNSIGNED[bits])[index] = values if chosen is None else values[chosen]

    @staticmethod
    def _index(buffer: Buffer, addresses: Array, bits: int, count: int) -> Array:
        index: Array = ((addresses - buffer.origin) // (bits // 8))[:, None] + np.arange(count)
        return index

    def _locate(self, addresses: Array) -> list[tuple[Buffer, Array | None]]:
        """Which buffer each address lies in; None stands for all of them. Raises PtxError out of bounds."""
        if (addresses & (self.size - 1)).any():
            address = int(addresses[(addresses & (self.size - 1)) != 0][0])
            place = f"at {address:#x}, CTA {self.memory.cta}"
            raise PtxError(f"misaligned {self.size}-byte access {place}: {self.instruction.where}")
        low, high = int(addresses.min()), int(addresses.max()) + self.size
        for buffer in self.buffers:
            if buffer.start <= low and high <= buffer.end:
                return [(buffer, None)]
        parts: list[tuple[Buffer, Array | None]] = []
        left = np.ones(len(addresses), bool)
        for buffer in self.buffers:
            inside = left & (addresses >= buffer.start) & (addresses + self.size <= buffer.end)
            if inside.any():
                parts.append((buffer, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            raise PtxError(self._out_of_bounds(addresses[left]))
        return parts

    def _out_of_bounds(self, outside: Array) -> str:
        address = int(outside[0])
        near = min(self.buffers, key=lambda b: max(b.start - address, address + self.size - b.end))
        if address < near.start:
            place = f"{near.start - address} bytes before the start"
        else:
            place = f"{address + self.size - near.end} bytes past the end"
        return (
            f"out of bounds: {len(outside)} lanes of CTA {self.memory.cta}, the first {place} of {near.name} "
            f"({near.end - near.start} bytes): {self.instruction.where}"
        )

    def _count(self, traffic: Traffic, addresses: Array, lanes: Array) -> int:
        """Count one request per warp; returns the bytes of the sectors. An aligned access lies in one sector."""
        keys = np.sort((addresses // SECTOR) | (lanes >> 5 << 48))
        distinct = keys[np.flatnonzero(np.diff(keys, prepend=-1))]
        warps = len(np.flatnonzero(np.diff(distinct >> 48))) + 1
        traffic.add(len(addresses), self.size, warps, len(distinct), distinct & ((1 << 48) - 1))
        return len(distinct) * SECTOR


def pointer_roots(program: Program, pointers: set[str]) -> dict[str, frozenset[str]]:
    """Register -> the pointer parameters (and constants) its value is computed from, loads from memory excepted.

    A flow-insensitive fixpoint: what any path may put into a register. It tells which argument an access means, so
    that its bounds are that tensor's own, also where views of one storage interleave.
    """
    roots: dict[str, frozenset[str]] = {}
    skipped = ("setp", "atom", "bar", "ret", "bra", "st", "red")
    copies = [i for i in program.instructions if not i.opcode.startswith(skipped) and len(i.operands) >= 2]
    changed = True
    while changed:
        changed = False
        for instruction in copies:
            source = instruction.operands[1:]
            if instruction.opcode.startswith("ld"):
                if ".param" not in instruction.opcode:
                    continue
                source = tuple(o.base for o in source if isinstance(o, Address))
            found = frozenset().union(*(_roots_of(operand, roots, pointers) for operand in source))
            for name in registers(instruction.operands[0]) if found else ():
                merged = roots.get(name, frozenset()) | found
                if merged != roots.get(name):
                    roots[name], changed = merged, True
    return roots


def _roots_of(operand: object, roots: dict[str, frozenset[str]], pointers: set[str]) -> frozenset[str]:
    if isinstance(operand, Symbol):
        return frozenset({operand.name}) if operand.name in pointers else frozenset()
    return frozenset().union(*(roots.get(name, frozenset()) for name in registers(operand)))


def registers(operand: object) -> list[str]:
    """Names of the registers an operand mentions."""
    if isinstance(operand, Register):
        return [operand.name]
    if isinstance(operand, Vector):
        return [name for item in operand.items for name in registers(item)]
    if isinstance(operand, Address):
        return registers(operand.base)
    if isinstance(operand, Pair):
        return registers(operand.first) + registers(operand.second)
    return [operand.predicate.name] if isinstance(operand, Negated) else []
