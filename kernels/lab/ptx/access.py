"""Loads, stores, asynchronous copies, atomics, and what has no effect here (fences, hints)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.kernels.lab.ptx.device_memory import registers
from headrace.kernels.lab.ptx.machine import Machine, Step, instruction
from headrace.kernels.lab.ptx.parse import WIDTHS, Address, Immediate, Instruction, Operand, PtxError
from headrace.kernels.lab.ptx.values import PACKED, SIGNED, UNSIGNED, Array, Mask, decode, dtype, encode

Locate = Callable[[Mask], tuple[Array, Array]]


def locator(machine: Machine, operand: Operand, bits: int) -> Locate:
    """What gives, for a mask, the active lanes and the address each of them means."""
    if not isinstance(operand, Address):
        raise PtxError(f"operand {operand} where an address is needed")
    base, offset = machine.view(operand.base, f"b{bits}"), operand.offset
    if bits == 64:
        base = base.view(np.int64)

    def locate(mask: Mask) -> tuple[Array, Array]:
        lanes = machine.active(mask)
        chosen = base if mask is True else base[lanes]
        return lanes, chosen.astype(np.int64, copy=False) + offset

    return locate


def _address_bits(machine: Machine, operand: Operand) -> int:
    names = registers(operand)
    return machine.program.registers[names[0]] if names else 32


def space_of(each: Instruction) -> str:
    for part in each.parts[1:]:
        name = part.partition("::")[0]
        if name in ("global", "shared", "local", "param", "const"):
            return name
    return "global"  # a generic address: on this machine the global ones


def vector_of(each: Instruction) -> int:
    return next((int(part[1:]) for part in each.parts[1:] if part in ("v2", "v4", "v8")), 1)


def loaded_bits(each: Instruction) -> int:
    """Bits a lane that a load from global memory brings, to registers or asynchronously; 0: it is none."""
    if each.parts[0] == "ld" and space_of(each) == "global":
        return WIDTHS[each.parts[-1]] * vector_of(each)
    if each.opcode.startswith("cp.async") and "shared" in each.opcode and "bulk" not in each.parts:
        size = each.operands[2]
        return 8 * size.bits if isinstance(size, Immediate) else 0
    return 0


@instruction("ld", "ldu")
def load(machine: Machine, each: Instruction) -> Step:
    space, kind, count = space_of(each), each.parts[-1], vector_of(each)
    if space == "param":
        return _load_parameter(machine, each)
    bits = WIDTHS[kind]
    if bits == 128:
        raise PtxError("128-bit registers")
    size = bits // 8 * count
    writes = [machine.sink(item, kind) for item in machine.components(each.operands[0])]
    fetch = _fetcher(machine, each, space, size, bits)
    signed = kind[0] == "s"

    def step(mask: Mask) -> None:
        lanes, values = fetch(mask)
        if signed:
            values = values.view(SIGNED[bits])
        for index, write in enumerate(writes):
            column = values[:, index]
            if mask is not True:
                column = np.zeros(machine.threads, values.dtype)
                column[lanes] = values[:, index]
            write(column, mask)

    return step


def _fetcher(
    machine: Machine, each: Instruction, space: str, size: int, bits: int
) -> Callable[[Mask], tuple[Array, Array]]:
    """What gives the active lanes and the components [lanes, n] they load."""
    address = each.operands[1]
    if space == "shared":
        locate = locator(machine, address, _address_bits(machine, address))

        def from_shared(mask: Mask) -> tuple[Array, Array]:
            lanes, addresses = locate(mask)
            return lanes, machine.shared.load(each, addresses, machine.warp_of[lanes], size, bits)

        return from_shared
    locate = locator(machine, address, 64)
    if space == "local":
        words = machine.local.view(UNSIGNED[bits]) if machine.local.shape[1] % (bits // 8) == 0 else machine.local

        def from_local(mask: Mask) -> tuple[Array, Array]:
            lanes, addresses = locate(mask)
            return lanes, words[lanes[:, None], (addresses // (bits // 8))[:, None] + np.arange(size * 8 // bits)]

        return from_local
    site = machine.memory.site(each, machine.argument_names(address), size)
    names = [name for name in registers(each.operands[0]) if name != "_"]

    def from_global(mask: Mask) -> tuple[Array, Array]:
        lanes, addresses = locate(mask)
        values, fetched = site.load(addresses, lanes, bits)
        machine.in_flight.issue(fetched, names)
        return lanes, values

    return from_global


def _load_parameter(machine: Machine, each: Instruction) -> Step:
    """The value is known when the launch is."""
    source, kind = each.operands[1], each.parts[-1]
    if not isinstance(source, Address):
        raise PtxError("a parameter without an address")
    pattern = machine.parameters[getattr(source.base, "name", "")] >> (8 * source.offset)
    bits = WIDTHS[kind]
    write = machine.sink(each.operands[0], kind)
    constant = np.full(machine.threads, pattern & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype(kind, bits))
    return lambda mask: write(constant, mask)


@instruction("st")
def store(machine: Machine, each: Instruction) -> Step:
    space, kind, count = space_of(each), each.parts[-1], vector_of(each)
    bits = WIDTHS[kind]
    views = [machine.view(item, f"b{bits}") for item in machine.components(each.operands[1])]
    address = each.operands[0]
    locate = locator(machine, address, _address_bits(machine, address) if space == "shared" else 64)
    site = None
    if space == "global":
        site = machine.memory.site(each, machine.argument_names(address), bits // 8 * count)

    def step(mask: Mask) -> None:
        lanes, addresses = locate(mask)
        values = np.stack(views, 1)
        if mask is not True:
            values = values[lanes]
        if site is not None:
            site.store(addresses, lanes, values, bits)
        elif space == "shared":
            machine.shared.store(each, addresses, machine.warp_of[lanes], values, bits)
        else:
            words = machine.local.view(UNSIGNED[bits])
            words[lanes[:, None], (addresses // (bits // 8))[:, None] + np.arange(count)] = values

    return step


@instruction("cp")
def copy(machine: Machine, each: Instruction) -> Step:
    """cp.async and its groups. Groups are the CTA's: every thread commits and waits alike in Triton's code."""
    if "bulk" in each.parts or "mbarrier" in each.parts:
        raise PtxError("bulk copies (TMA)")
    if "commit_group" in each.parts:
        return lambda mask: machine.shared.commit()
    if "wait_all" in each.parts:
        return lambda mask: machine.in_flight.issue(-machine.shared.wait_all())
    if "wait_group" in each.parts:
        keep = each.operands[0]
        groups = keep.bits if isinstance(keep, Immediate) else 0
        return lambda mask: machine.in_flight.issue(-machine.shared.wait(groups))
    return _copy_async(machine, each)


def _copy_async(machine: Machine, each: Instruction) -> Step:
    """[shared], [global], size{, source size}{, cache policy}: lanes with source size 0 read nothing, get zeros."""
    target, source, length = each.operands[:3]
    rest = each.operands[3:-1] if "cache_hint" in each.opcode else each.operands[3:]
    size = length.bits if isinstance(length, Immediate) else 0
    locate_target = locator(machine, target, _address_bits(machine, target))
    locate_source = locator(machine, source, 64)
    site = machine.memory.site(each, machine.argument_names(source), size)
    given = machine.view(rest[0], "u32") if rest else None

    def step(mask: Mask) -> None:
        lanes, places = locate_target(mask)
        _, addresses = locate_source(mask)
        values = np.zeros((len(lanes), size // 4), np.uint32)
        fetched = 0
        if given is None:
            values, fetched = site.load(addresses, lanes, 32)
        else:
            read = given[lanes]
            full = read == size
            if ((read != 0) & ~full).any():
                raise PtxError(f"not implemented: a copy that reads a part of its {size} bytes: {each.where}")
            if full.any():
                values[full], fetched = site.load(addresses[full], lanes[full], 32)
        machine.in_flight.issue(fetched)
        machine.shared.copy(each, places, machine.warp_of[lanes], values, 32, fetched)

    return step


ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype),
}


@instruction("atom", "red")
def atomic(machine: Machine, each: Instruction) -> Step:
    """One lane after the other, in the order of the lanes; CTAs run one after the other."""
    kind, returns = each.parts[-1], each.parts[0] == "atom"
    swaps = "cas" in each.parts
    name = next((part for part in each.parts[1:] if part in ATOMIC), "")
    if kind in PACKED or vector_of(each) != 1 or not (swaps or name):
        raise PtxError("this atomic")
    bits = WIDTHS[kind]
    address, value, *more = each.operands[1 if returns else 0 :]
    shared = space_of(each) == "shared"
    locate = locator(machine, address, _address_bits(machine, address) if shared else 64)
    site = None if shared else machine.memory.site(each, machine.argument_names(address), bits // 8)
    first = machine.view(value, kind)
    second = machine.view(more[0], kind) if swaps else None
    write = machine.sink(each.operands[0], f"b{bits}") if returns else None

    def update(old: Array, lane: int) -> Array:
        before = decode(old.view(first.dtype), kind)
        operand = decode(first[lane : lane + 1], kind)
        if second is not None:
            return np.where(before == operand, second[lane : lane + 1], before)
        result = ATOMIC[name](before, operand)
        return encode(result, kind) if kind == "bf16" else result

    def step(mask: Mask) -> None:
        lanes, addresses = locate(mask)
        found = np.zeros(machine.threads, UNSIGNED[bits])
        for lane, place in zip(lanes, addresses, strict=True):
            where, one = np.array([place]), np.array([lane])
            if site is None:
                old = machine.shared.views[bits][where // (bits // 8)]
                machine.shared.views[bits][where // (bits // 8)] = update(old, lane).view(UNSIGNED[bits])
            else:
                old = site.load(where, one, bits)[0][:, 0].copy()
                site.store(where, one, update(old, lane).view(UNSIGNED[bits])[:, None], bits)
            found[lane] = old[0]
        if write is not None:
            write(found, mask)

    return step


@instruction("membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard", "applypriority")
@instruction("pragma")
def nothing(machine: Machine, each: Instruction) -> Step:
    return lambda mask: None


@instruction("createpolicy")
def cache_policy(machine: Machine, each: Instruction) -> Step:
    write, zero = machine.sink(each.operands[0], "b64"), np.zeros(machine.threads, np.uint64)
    return lambda mask: write(zero, mask)


@instruction("trap", "brkpt")
def trap(machine: Machine, each: Instruction) -> Step:
    def step(mask: Mask) -> None:
        raise PtxError(f"trap in CTA {machine.cta}: {each.where}")

    return step
