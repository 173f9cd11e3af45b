"""What lanes and warps do together: barriers, shuffles, votes, reductions."""

from __future__ import annotations

import numpy as np

from headrace.kernels.lab.ptx.machine import WARP, Machine, Step, instruction
from headrace.kernels.lab.ptx.parse import Immediate, Instruction, Negated, Operand, Pair, PtxError
from headrace.kernels.lab.ptx.values import Array, Mask

LANE = np.arange(WARP)


@instruction("bar", "barrier")
def barrier(machine: Machine, each: Instruction) -> Step:
    if "warp" in each.parts:
        return lambda mask: None  # the lanes of a warp are in step anyway
    threads = each.operands[1] if len(each.operands) > 1 else None
    partial = threads is not None and not (isinstance(threads, Immediate) and threads.bits == machine.threads)
    if "sync" not in each.parts or partial:
        raise PtxError("a barrier of some of the threads")

    def step(mask: Mask) -> None:
        if machine.waiting:
            raise PtxError(f"divergent barrier in CTA {machine.cta}: {each.where}")
        machine.shared.barrier()

    return step


def _both(operand: Operand) -> tuple[Operand, Operand | None]:
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)


@instruction("shfl")
def shuffle(machine: Machine, each: Instruction) -> Step:
    """shfl.sync: from another lane of the segment; a lane whose source lies outside keeps its own value."""
    mode = each.parts[2] if each.parts[1] == "sync" else each.parts[1]
    target, within = _both(each.operands[0])
    source, offset, clamp = (machine.view(operand, "b32") for operand in each.operands[1:4])
    write = machine.sink(target, "b32")
    write_within = machine.sink(within, "pred") if within is not None else None

    def step(mask: Mask) -> None:
        by = (offset & np.uint32(31)).astype(np.int64).reshape(-1, WARP)
        segment = (clamp >> np.uint32(8) & np.uint32(31)).astype(np.int64).reshape(-1, WARP)
        limit = (clamp & np.uint32(31)).astype(np.int64).reshape(-1, WARP)
        last = (LANE & segment) | (limit & ~segment)
        if mode == "idx":
            lane = (LANE & segment) | (by & ~segment)
        else:
            lane = {"up": LANE - by, "down": LANE + by, "bfly": LANE ^ by}[mode]
        inside = lane >= last if mode == "up" else lane <= last
        lane = np.where(inside, lane, LANE)
        write(np.take_along_axis(source.reshape(-1, WARP), lane, 1).reshape(-1), mask)
        if write_within is not None:
            write_within(inside.reshape(-1), mask)

    return step


def _members(machine: Machine, mask: Mask) -> Array:
    """Active lanes as [warps, 32]."""
    return (np.ones(machine.threads, bool) if isinstance(mask, bool) else mask).reshape(-1, WARP)


@instruction("vote")
def vote(machine: Machine, each: Instruction) -> Step:
    mode = next(part for part in each.parts if part in ("all", "any", "uni", "ballot"))
    operand = each.operands[1]
    negated = isinstance(operand, Negated)
    predicate = machine.view(operand.predicate if isinstance(operand, Negated) else operand, "pred")
    write = machine.sink(each.operands[0], "b32" if mode == "ballot" else "pred")
    powers = np.uint32(1) << LANE.astype(np.uint32)

    def step(mask: Mask) -> None:
        members = _members(machine, mask)
        votes = (~predicate if negated else predicate).reshape(-1, WARP)
        if mode == "ballot":
            result = np.where(votes & members, powers, np.uint32(0)).sum(1, dtype=np.uint32)
        else:
            every, some = (votes | ~members).all(1), (votes & members).any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(np.repeat(result, WARP), mask)

    return step


@instruction("activemask")
def active_mask(machine: Machine, each: Instruction) -> Step:
    write = machine.sink(each.operands[0], "b32")
    powers = np.uint32(1) << LANE.astype(np.uint32)

    def step(mask: Mask) -> None:
        found = np.where(_members(machine, mask), powers, np.uint32(0)).sum(1, dtype=np.uint32)
        write(np.repeat(found, WARP), mask)

    return step


@instruction("elect")
def elect(machine: Machine, each: Instruction) -> Step:
    """elect.sync d|p: the lowest active lane of every warp."""
    target, leads = _both(each.operands[0])
    write = machine.sink(target, "b32")
    write_leads = machine.sink(leads, "pred") if leads is not None else None

    def step(mask: Mask) -> None:
        leader = _members(machine, mask).argmax(1)
        write(np.repeat(leader, WARP).astype(np.uint32), mask)
        if write_leads is not None:
            write_leads(np.repeat(leader, WARP) == machine.lanes % WARP, mask)

    return step


@instruction("redux")
def reduce(machine: Machine, each: Instruction) -> Step:
    name, kind = each.parts[2], each.parts[-1]
    floating = kind == "f32"
    functions: dict[str, np.ufunc] = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.fmin if floating and "NaN" not in each.parts else np.minimum,
        "max": np.fmax if floating and "NaN" not in each.parts else np.maximum,
    }
    function = functions[name]
    source, write = machine.view(each.operands[1], kind), machine.sink(each.operands[0], kind)
    absolute = "abs" in each.parts

    def step(mask: Mask) -> None:
        values = np.abs(source) if absolute else source
        result = np.zeros_like(values)
        for row, members, found in zip(
            values.reshape(-1, WARP), _members(machine, mask), result.reshape(-1, WARP), strict=True
        ):
            if members.any():
                found[:] = function.reduce(row[members], dtype=row.dtype)
        write(result, mask)

    return step
